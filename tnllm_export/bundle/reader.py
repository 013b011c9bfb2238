"""Opening a bundle: schema, presence, sizes and checksums are checked, and what is wrong is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tnllm_export.bundle import files
from tnllm_export.bundle.layout import WeightsLayout, read_layout
from tnllm_export.bundle.manifest import MANIFEST, FileRecord, Manifest, check_relative_name, parse_manifest
from tnllm_export.errors import BundleCorruptError, BundleError, BundleNotFoundError, WriteError
from tnllm_export.models.checkpoint import Checkpoint, open_weights
from tnllm_export.progress import Progress, silent

REPORTS = "reports"
REPORT_JSON = "parity.json"
REPORT_PAGE = "parity.html"
_REMEDY = "export again, or fetch the bundle again"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest

    @property
    def prefill_path(self) -> Path:
        """The graph of the prefill program."""
        return self.path / self.manifest.graphs.prefill.file

    @property
    def decode_path(self) -> Path:
        """The graph of the decode program."""
        return self.path / self.manifest.graphs.decode.file

    @property
    def weights_path(self) -> Path:
        """Weights of both graphs, a safetensors file."""
        return self.path / self.manifest.weights

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer, or None where the checkpoint had none."""
        return None if self.manifest.tokenizer is None else self.path / self.manifest.tokenizer

    def weights_layout(self) -> WeightsLayout:
        """Read what the weights file holds, from its header."""
        return read_layout(self.weights_path)

    def checkpoint(self) -> Checkpoint:
        """Open the bundle's weights as a checkpoint, for `load_model`: the eager model of this very bundle."""
        return replace(open_weights(self.manifest.config, self.weights_path), tokenizer_path=self.tokenizer_path)

    def add_reports(self, parity: Mapping[str, Any], reports: Mapping[str, bytes]) -> "Bundle":
        """Add what `verify` saw, in place of earlier reports of the same names.

        Args:
            parity: Summary for the manifest.
            reports: Content by file name; the files go to the folder `reports`.

        Returns:
            The bundle with its new manifest.

        Raises:
            WriteError: Disk full, no permission, or another bundle has taken this one's place.
        """
        named = {check_relative_name(f"{REPORTS}/{name}"): content for name, content in reports.items()}
        others = {name: record for name, record in self.manifest.files.items() if name not in named}
        with files.reporting_write_errors(self.path), files.locked(self.path):
            self._check_still_there()
            # Killed at any point, this leaves a bundle that is whole: first without the reports, then with them.
            if len(others) < len(self.manifest.files):
                self._write_manifest(self.manifest.model_copy(update={"files": others, "parity": None}))
            records = {name: files.replace(self.path / name, content) for name, content in named.items()}
            manifest = self.manifest.model_copy(update={"files": others | records, "parity": dict(parity)})
            self._write_manifest(manifest)
        return replace(self, manifest=manifest)

    def _check_still_there(self) -> None:
        try:
            found = parse_manifest((self.path / MANIFEST).read_bytes(), self.path / MANIFEST)
        except BundleError:
            found = None
        if found is None or _without_reports(found) != _without_reports(self.manifest):
            raise WriteError(f"{self.path}: another bundle has taken this one's place; do that again")

    def _write_manifest(self, manifest: Manifest) -> None:
        files.replace(self.path / MANIFEST, manifest.to_text().encode())


def open_bundle(path: Path | str, check: bool = True, progress: Progress = silent) -> Bundle:
    """Open a bundle.

    Args:
        path: The bundle's folder.
        check: Whether to compare every file with its checksum; presence and sizes are always checked.
        progress: Told of the bytes that have been checked.

    Raises:
        BundleNotFoundError: There is no bundle.
        BundleVersionError: Written by a newer version of this package.
        BundleCorruptError: The manifest is broken, or a file is missing or differs from its checksum.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise BundleNotFoundError(f"{path}: no such folder; expected a bundle, make one with `tnllm export`")
    if not manifest_path.is_file():
        raise BundleNotFoundError(f"{path}: no {MANIFEST}, so this is no bundle; make one with `tnllm export`")
    manifest = parse_manifest(manifest_path.read_bytes(), manifest_path)
    for name, record in manifest.files.items():
        _check_presence(path / name, record)
    if check:
        _check_content(path, manifest, progress)
    return Bundle(path, manifest)


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, of any version and in any state of repair: one that an export may replace."""
    try:
        fields = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"schema_version", "lowering", "graphs"} <= fields.keys()


def bundle_around(folder: Path) -> Path | None:
    """Return the bundle that an absolute folder is, or lies in; None where there is none."""
    return next((found for found in (folder, *folder.parents) if is_bundle(found)), None)


def _without_reports(manifest: Manifest) -> Manifest:
    others = {name: record for name, record in manifest.files.items() if not name.startswith(f"{REPORTS}/")}
    return manifest.model_copy(update={"files": others, "parity": None})


def _check_presence(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise BundleCorruptError(f"{path}: missing, but the manifest lists it; {_REMEDY}")
    found = path.stat().st_size
    if found != record.bytes:
        raise BundleCorruptError(f"{path}: has {found} bytes; expected {record.bytes}, {_REMEDY}")


def _check_content(path: Path, manifest: Manifest, progress: Progress) -> None:
    total = sum(record.bytes for record in manifest.files.values())
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress("checking the bundle", done, total, "bytes")

    for name, record in manifest.files.items():
        if files.hash_file(path / name, advance) != record.sha256:
            raise BundleCorruptError(f"{path / name}: content differs from its checksum; {_REMEDY}")
