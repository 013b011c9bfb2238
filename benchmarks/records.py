"""What a measurement is, and the file it goes to."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

COMMIT_VARIABLE = "TNLLM_COMMIT"
"""Names the commit where there is no repository to ask, as on a machine that got a copy of the files."""

_TOOLS = ("torch", "onnx", "onnxruntime")
_GPU_TOOLS = ("torch", "triton", "fla-core", "lightning-attn")
_SAVE_INTERVAL_S = 2.0


def versions(tools: Iterable[str] = _TOOLS) -> dict[str, str]:
    """Versions of Python and of the packages among `tools` that are installed."""
    found = {"python": platform.python_version()}
    for name in tools:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu_versions() -> dict[str, str]:
    """Versions of what runs on a GPU: torch, triton, the peers."""
    return versions(_GPU_TOOLS)


def current_commit() -> str:
    """This project's commit, marked where the code differs from it; `TNLLM_COMMIT` goes first."""
    return os.environ.get(COMMIT_VARIABLE) or _checked_out_commit()


@cache
def _checked_out_commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "graphs", "tnllm_export")
    return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")


@dataclass(frozen=True)
class Record:
    """One number.

    Attributes:
        name: Of the benchmark.
        case: What was measured, e.g. "7B, .bin shards".
        metric: e.g. "peak resident memory".
        unit: Of value, floor and peer_value.
        value: What was measured; None where it could not be.
        floor: What no implementation could beat, or the limit to keep; None where there is none.
        peer: What it is compared with, in the same run.
        peer_value: What that took; None where the peer could not run, and `peer` then says why.
        versions: Of the tools.
        commit: Of this project.
    """

    name: str
    case: str
    metric: str
    unit: str
    value: float | None
    floor: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    versions: dict[str, str] = field(default_factory=versions)
    commit: str = field(default_factory=current_commit)


def device_name(device: str = "cpu") -> str:
    """The processor or GPU ("cuda") that results are for, as a file name."""
    if device == "cuda":
        import torch  # noqa: PLC0415

        return torch.cuda.get_device_name().lower().replace(" ", "-")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip().lower().replace(" ", "-")
    return platform.machine()


def results_path(device: str = "cpu") -> Path:
    """The results file of this machine's processor or GPU."""
    return RESULTS / f"{device_name(device)}.json"


def save(records: Iterable[Record], path: Path | None = None) -> Path:
    """Put records into the device's results file, in place of earlier ones of the same benchmarks.

    Records are written as they come, so that a run that is stopped keeps what it has measured.
    """
    path = path or results_path()
    old = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    new: list[dict[str, object]] = []
    written = time.monotonic()
    try:
        for record in records:
            new.append(asdict(record))
            if time.monotonic() - written > _SAVE_INTERVAL_S:
                _write(path, old, new)
                written = time.monotonic()
    finally:
        _write(path, old, new)
    return path


def load(path: Path) -> list[Record]:
    """Read a results file."""
    return [Record(**fields) for fields in json.loads(path.read_text())]


def _write(path: Path, old: list[dict[str, object]], new: list[dict[str, object]]) -> None:
    names = {record["name"] for record in new}
    path.write_text(json.dumps([r for r in old if r["name"] not in names] + new, indent=1) + "\n")
