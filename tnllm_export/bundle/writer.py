"""Writing a bundle: into a temporary folder beside its place, renamed when all of it is on the disk."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from tnllm_export.bundle import files
from tnllm_export.bundle.direct import DirectFile
from tnllm_export.bundle.engines import is_engine_file
from tnllm_export.bundle.layout import DTYPES, WeightsLayout
from tnllm_export.bundle.manifest import MANIFEST, WEIGHTS, FileRecord, Manifest, check_relative_name
from tnllm_export.bundle.reader import REPORT_JSON, REPORT_PAGE, REPORTS, Bundle, bundle_around, is_bundle
from tnllm_export.errors import BundleExistsError, WriteError
from tnllm_export.models.finite import check_cast
from tnllm_export.progress import Progress, silent

_PIECE_BYTES = 1 << 26
"""How much of a weight is cast, checked and copied at once. Between pieces the writer waits for its turn in the
interpreter, which an export shares with the tracer; so there are few."""

_REPORTS = {f"{REPORTS}/{name}" for name in (REPORT_JSON, REPORT_PAGE)}
"""What `tnllm verify` adds to a bundle; the manifest does not list it while that is under way."""

_ATTEMPTS = 100
"""To take a place that others take at the same time."""


class BundleWriter:
    """Writes one bundle; used as a context manager, which leaves nothing behind unless `commit` has returned.

    All is written to `.NAME.partial-PID-RANDOM` beside the bundle's place. That folder is locked while its writer
    lives, so the next export to the same place can tell what a killed one has left behind, and removes it. Where a
    file system locks no folders (NFS), nothing can be told and what was left behind stays.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        """Check the place, before any work.

        Args:
            path: Where the bundle shall be. Missing parent folders are made.
            overwrite: Whether a bundle that is there may be replaced. Nothing but a bundle ever is.

        Raises:
            BundleExistsError: Something is there that may not be replaced, or the place is in another bundle.
            WriteError: The place can't be looked at.
        """
        self.path = path.resolve()
        self._overwrite = overwrite
        self._files: dict[str, FileRecord] = {}
        self._lock: int | None = None
        with files.reporting_write_errors(self.path):
            _check_place(self.path, overwrite)
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise WriteError(f"{self.path}: no UTF-8, which ONNX's checker wants; choose another path") from None

    def __enter__(self) -> Self:
        """Make the temporary folder. Raises WriteError where that is not possible, or BundleExistsError."""
        with files.reporting_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(self.path)
            _check_place(self.path, self._overwrite)  # again: a lost bundle may be back
            self._partial = _sibling(self.path, "partial")
            self._partial.mkdir()
            try:
                self._lock = files.lock(self._partial)
            except BlockingIOError:
                raise
            except OSError:
                self._lock = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Where the bundle's files stand until `commit`: for checks that need them side by side."""
        return self._partial

    def write_weights(
        self, layout: WeightsLayout, tensors: Iterable[tuple[str, Tensor]], progress: Progress = silent
    ) -> None:
        """Write `weights.safetensors`, holding a few pieces of a tensor in memory at a time.

        Args:
            layout: The file's plan. Tensors are cast to its dtypes.
            tensors: Name and values of each of its tensors, in the order of `layout.names`.
            progress: Told of the bytes that have been written.

        Raises:
            NonFiniteWeightsError: A weight is NaN, infinite, or too large for its dtype.
            WriteError: Disk full, or no permission.
        """
        free = shutil.disk_usage(self._partial).free
        if free < layout.total_bytes:
            raise WriteError(
                f"{self.path}: the disk is full: {layout.total_bytes} bytes of weights, {free} bytes free; "
                "free some space or choose another path"
            )
        with files.reporting_write_errors(self.path), DirectFile(self._partial / WEIGHTS) as file:
            file.write(layout.header)
            done = len(layout.header)
            for (name, tensor), expected in zip(tensors, layout.weights.values(), strict=True):
                if name != expected.spec.name or tuple(tensor.shape) != expected.spec.shape:
                    raise ValueError(
                        f"got {name} {list(tensor.shape)}; the layout has {expected.spec.name} "
                        f"{list(expected.spec.shape)} here"
                    )
                dtype = DTYPES[expected.spec.dtype]
                size = _PIECE_BYTES // max(tensor.itemsize, dtype.itemsize)
                for source in torch.split(tensor.detach().reshape(-1), size):
                    piece = source if source.dtype == dtype else source.to(dtype)
                    check_cast(name, source, piece)
                    file.write(piece.view(torch.uint8).numpy())
                    done += piece.nbytes
                    progress("writing weights", done, layout.total_bytes, "bytes")
            self._files[WEIGHTS] = file.settle()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file, `name` being its path inside the bundle. Raises WriteError."""
        with files.reporting_write_errors(self.path):
            self._files[name] = files.write_new(self._partial / check_relative_name(name), (data,))

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file to the path `name` inside the bundle. Raises WriteError."""
        with files.reporting_write_errors(self.path):
            self._files[name] = files.write_new(self._partial / check_relative_name(name), files.read_pieces(source))

    def commit(self, manifest: Manifest) -> Bundle:
        """Put the bundle in its place, all at once, and return it.

        Args:
            manifest: Its `files` are filled in here.

        Raises:
            BundleExistsError: Something has appeared at the bundle's place meanwhile.
            WriteError: Disk full, or no permission.
        """
        manifest = manifest.model_copy(update={"files": dict(sorted(self._files.items()))})
        with files.reporting_write_errors(self.path):
            files.write_new(self._partial / MANIFEST, (manifest.to_text().encode(),))
            for folder, _, _ in os.walk(self._partial):
                files.sync_folder(Path(folder))
            _check_place(self.path, self._overwrite)
            self._take_place()
        return Bundle(self.path, manifest)

    def _take_place(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            old = _sibling(self.path, "old")
            with suppress(FileNotFoundError):
                self.path.rename(old)
            try:
                self._partial.rename(self.path)
                break
            except OSError as error:
                taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
                if not taken and old.exists():
                    old.rename(self.path)
                if not taken or attempt == _ATTEMPTS:
                    raise
                _check_place(self.path, self._overwrite)  # another export was quicker
            finally:
                if self.path.exists():
                    shutil.rmtree(old, ignore_errors=True)
        files.sync_folder(self.path.parent)


def _check_place(path: Path, overwrite: bool) -> None:
    around = bundle_around(path.parent)
    if around is not None:
        raise BundleExistsError(f"{path}: lies in the bundle {around}; choose another path")
    if not path.exists():
        return
    if not overwrite:
        raise BundleExistsError(f"{path}: exists already; choose another path, or --overwrite to replace a bundle")
    if not is_bundle(path):
        raise BundleExistsError(f"{path}: is no bundle, so it is not overwritten; choose another path")
    closed = next((folder for folder, _, _ in os.walk(path) if not os.access(folder, os.W_OK)), None)
    if closed is not None:
        raise BundleExistsError(
            f"{path}: no permission to write to {closed}, so it is not overwritten; change the folder's permissions or "
            "choose another path"
        )
    foreign = _foreign_files(path)
    if foreign:
        raise BundleExistsError(
            f"{path}: holds files that are no part of the bundle ({', '.join(foreign[:5])}), so it is not overwritten; "
            "move them elsewhere"
        )


def _foreign_files(path: Path) -> list[str]:
    """List what someone else has put into a bundle's folder, even if the manifest can no longer be trusted."""
    listed = json.loads((path / MANIFEST).read_bytes()).get("files") or {}
    ours = {MANIFEST, *listed, *_REPORTS}
    found = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return sorted(
        name
        for file in found
        if (name := file.relative_to(path).as_posix()) not in ours
        and (file.is_symlink() or not (is_engine_file(name) or files.is_partial(file)))
    )


def _sibling(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}{files.temporary_suffix(role)}")


def _clear_leftovers(path: Path) -> None:
    """Remove what killed exports to the same place have left; put an old bundle back that lost its place."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(partial|old)-\d+-[0-9a-f]+")
    for leftover in path.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if match is None or not _is_abandoned(leftover):
            continue
        if match[1] == "old" and not path.exists():
            leftover.rename(path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    # The lock tells, not the process id: ids are used again, and mean nothing across containers.
    try:
        os.close(files.lock(folder))
    except OSError:
        return False
    return True
