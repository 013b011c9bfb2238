"""Engines in a bundle: `engines/<target>/<key>/`, written whole or not at all, each with a record of what shaped it.

TensorRT's engines, and AOTInductor's packages, which take the place of engines in all that is said here.

The manifest does not list them: they are made from the bundle and can be made again. Their own record has checksums.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from tnllm_export.bundle import files
from tnllm_export.bundle.manifest import FileName, FileRecord, Manifest
from tnllm_export.errors import EngineMismatchError
from tnllm_export.progress import Progress, silent

ENGINES = "engines"
RECORD = "engines.json"
ENGINE_SUFFIX = ".engine"
PLUGIN_LIBRARY = "libtnllm_plugins.so"
PACKAGE_SUFFIX = ".pt2"
CONSTANTS = "constants.safetensors"
"""Beside AOTInductor's packages: what they need and no checkpoint has."""
ENGINE_FILES: Mapping[str, str] = {name: f"{name}{ENGINE_SUFFIX}" for name in ("prefill", "decode")}

_FILES = {
    RECORD,
    *ENGINE_FILES.values(),
    *(f"{name}{PACKAGE_SUFFIX}" for name in ENGINE_FILES),
    CONSTANTS,
    PLUGIN_LIBRARY,
}
_PARTIAL = ".partial-"

WeightsMode = Literal["embedded", "external", "stripped"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PluginRecord(_Record):
    """The plugin library that an engine needs: its checksum, and whether the engine carries it."""

    sha256: str
    embedded: bool


class ProfileRecord(_Record):
    """The shapes that an engine takes; the smallest are 1. `prompt` is the number of tokens of one prefill."""

    max_batch: int
    opt_batch: int
    max_prompt: int
    opt_prompt: int


class EngineSpec(_Record):
    """All that shapes a pair of engines: the same spec, the same engines.

    Attributes:
        recipe: Counts changes of how this package builds.
        target: e.g. "tensorrt-rtx".
        version: Of TensorRT, or of PyTorch.
        device: The GPU or CPU that it is built for, "" where it is built for none in particular.
        compute_capabilities: That it is built for, e.g. ("8.6",); empty for the target's own choice.
        graphs: Checksums of the graphs, by program.
        weights_sha256: Checksum of the weights; "" for engines that take any weights of these shapes.
        dtype: Of weights and activations.
        lowering: Which form the two ops have in the graphs.
        weights: Where the weights are: "embedded" in each engine; "external", inputs of the engine, which both engines
            share; or "stripped", put back by a refit.
        profile: The shapes; None where any do.
        tf32: Whether float32 products may round their factors to 10 bits.
        plugin: The plugin library, for the lowering `plugin`.
    """

    recipe: int
    target: str
    version: str
    device: str
    compute_capabilities: tuple[str, ...]
    graphs: dict[str, str]
    weights_sha256: str
    dtype: str
    lowering: str
    weights: WeightsMode
    profile: ProfileRecord | None
    tf32: bool
    plugin: PluginRecord | None

    @property
    def key(self) -> str:
        """The name of its folder: a hash of all of it."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class EngineRecord(_Record):
    """What `engines.json` says."""

    schema_version: Literal[1] = 1
    spec: EngineSpec
    files: dict[FileName, FileRecord]
    seconds: float


@dataclass(frozen=True)
class EngineSet:
    """A pair of engines, prefill and decode, that lies in a bundle."""

    path: Path
    record: EngineRecord

    @property
    def spec(self) -> EngineSpec:
        """What shaped them."""
        return self.record.spec

    def file(self, program: str) -> Path:
        """The engine of "prefill" or "decode"."""
        return self.path / ENGINE_FILES[program]

    @property
    def plugin_library(self) -> Path | None:
        """The plugin library that lies beside the engines, or None where they need none or carry it."""
        plugin = self.spec.plugin
        return None if plugin is None or plugin.embedded else self.path / PLUGIN_LIBRARY

    def kernel_cache(self, program: str, capability: str) -> Path:
        """Where TensorRT-RTX keeps kernels that it has compiled for GPUs of a compute capability, e.g. "8.6"."""
        return self.path / f"{program}-{capability}.cache"

    def check(self, progress: Progress = silent) -> None:
        """Compare each file with its checksum. Raises EngineMismatchError, naming the one that differs."""
        total = sum(record.bytes for record in self.record.files.values())
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            progress("checking the engines", done, total, "bytes")

        for name, record in self.record.files.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != record.bytes or _differs(path, record, advance):
                raise EngineMismatchError(f"{path}: missing or not as it was built; build again with `tnllm build`")


def is_engine_file(name: str) -> bool:
    """Whether a path in a bundle, "engines/…", has a name that building engines gives, finished or not."""
    folder, *rest = name.split("/")
    if folder != ENGINES or len(rest) != 3:
        return False
    _, key, file = rest
    found = re.fullmatch(rf"[0-9a-f]{{16}}({files.PARTIAL})?", key)
    ours = file in _FILES or re.fullmatch(r"(prefill|decode)-\d+\.\d+\.cache", file) is not None
    return found is not None and (found[1] is not None or ours)


def engines_of(bundle: Path) -> tuple[EngineSet, ...]:
    """Return all engines of a bundle whose record can be read, sorted by target and key; contents are not checked."""
    records = sorted(bundle.glob(f"{ENGINES}/*/*/{RECORD}"))
    return tuple(found for path in records if _PARTIAL not in path.parent.name and (found := _read(path)))


def read_engines(folder: Path) -> EngineSet:
    """Return the engines in a folder `engines/<target>/<key>`; contents are not checked.

    Raises:
        EngineMismatchError: It has no record, or one that can't be read.
    """
    found = _read(folder / RECORD)
    if found is None:
        raise EngineMismatchError(
            f"{folder}: no readable {RECORD}; expected the folder of engines that `tnllm build` made, build again"
        )
    return found


def graph_checksums(manifest: Manifest) -> dict[str, str]:
    """Return the checksum of each graph of a bundle, by program."""
    graphs = {"prefill": manifest.graphs.prefill.file, "decode": manifest.graphs.decode.file}
    return {program: manifest.files[file].sha256 for program, file in graphs.items()}


def is_current(engines: EngineSet, manifest: Manifest) -> bool:
    """Whether engines were built from the graphs of a bundle, and hold its weights if they hold any."""
    weights = engines.spec.weights_sha256
    return engines.spec.graphs == graph_checksums(manifest) and weights in (
        "",
        manifest.files[manifest.weights].sha256,
    )


def host_device() -> str:
    """Name this machine's CPU as the device of a spec, with the vector instructions that compiled code may use."""
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"


def find_engines(bundle: Path, spec: EngineSpec) -> EngineSet | None:
    """Return the engines of a bundle that were built from `spec`, or None; contents are not checked."""
    found = _read(bundle / ENGINES / spec.target / spec.key / RECORD)
    return found if found is not None and found.spec == spec else None


@contextmanager
def writing_engines(bundle: Path, spec: EngineSpec) -> "Iterator[EngineWriter]":
    """Give a writer for the engines of `spec`, which leaves nothing behind unless its `commit` has returned.

    Raises:
        WriteError: Disk full, no permission.
    """
    place = bundle / ENGINES / spec.target / spec.key
    partial = place.with_name(f"{spec.key}{files.temporary_suffix()}")
    with files.reporting_write_errors(place):
        partial.mkdir(parents=True)
        with _locked(partial):
            for leftover in place.parent.glob(f"*{_PARTIAL}*"):
                with contextlib.suppress(OSError), _locked(leftover):
                    shutil.rmtree(leftover)
            try:
                yield EngineWriter(place, partial, spec)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


class EngineWriter:
    """Writes the two engines of a spec into a temporary folder."""

    def __init__(self, place: Path, partial: Path, spec: EngineSpec) -> None:
        self._place = place
        self._partial = partial
        self._spec = spec
        self._files: dict[str, FileRecord] = {}

    def write(self, program: str, produce: Callable[[Callable[[bytes], None]], None]) -> None:
        """Write the engine of a program: `produce` is given a function that appends bytes."""
        name = ENGINE_FILES[program]
        with files.HashedFile(self._partial / name) as file:
            produce(file.write)
            self._files[name] = file.settle()

    def add_file(self, name: str, source: Path) -> None:
        """Put a copy of a file among them."""
        self._files[name] = files.write_new(self._partial / name, files.read_pieces(source))

    def copy_plugin_library(self, source: Path) -> None:
        """Put the library that the engines need beside them."""
        self.add_file(PLUGIN_LIBRARY, source)

    def commit(self, seconds: float) -> EngineSet:
        """Put the engines in their place, instead of what may be there, and return them."""
        record = EngineRecord(spec=self._spec, files=self._files, seconds=round(seconds, 3))
        files.write_new(self._partial / RECORD, (record.model_dump_json(indent=1).encode() + b"\n",))
        if self._place.exists():
            shutil.rmtree(self._place)
        self._partial.rename(self._place)
        files.sync_folder(self._place.parent)
        return EngineSet(self._place, record)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder while its writer lives; what a killed one has left behind can be locked. Raises OSError if not."""
    handle = files.lock(folder)
    try:
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> EngineSet | None:
    try:
        return EngineSet(path.parent, EngineRecord.model_validate_json(path.read_bytes()))
    except (OSError, ValidationError):
        return None


def _differs(path: Path, record: FileRecord, advance: Callable[[int], None]) -> bool:
    return files.hash_file(path, advance) != record.sha256
