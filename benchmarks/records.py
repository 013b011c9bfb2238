"""What a measurement is, and the file it goes to."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_TOOLS = ("torch", "onnx", "onnxruntime")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _TOOLS}}


def _commit() -> str:
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
        value: What was measured.
        floor: What no implementation could beat, or the limit to keep; None where there is none.
        peer: What it is compared with, in the same run.
        peer_value: What that took.
        versions: Of the tools.
        commit: Of this project.
    """

    name: str
    case: str
    metric: str
    unit: str
    value: float
    floor: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    versions: dict[str, str] = field(default_factory=_versions)
    commit: str = field(default_factory=_commit)


def device_name() -> str:
    """The processor these results are for, as a file name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip().lower().replace(" ", "-")
    return platform.machine()


def save(records: Iterable[Record], path: Path | None = None) -> Path:
    """Put records into the device's results file, in place of earlier ones of the same benchmarks."""
    path = path or RESULTS / f"{device_name()}.json"
    new = [asdict(record) for record in records]
    names = {record["name"] for record in new}
    old = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([r for r in old if r["name"] not in names] + new, indent=1) + "\n")
    return path


def load(path: Path) -> list[Record]:
    """Read a results file."""
    return [Record(**fields) for fields in json.loads(path.read_text())]
