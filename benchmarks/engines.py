"""TensorRT-RTX engines of a 1B-shaped bundle, built without a GPU: time, peak memory, size, by where the weights are.

A build is `tnllm build`, from the start of its process to its end, so that its peak memory is its own; it starts no
other processes. Builds of each kind take turns; the median time and the largest peak count.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import Record, versions
from benchmarks.scale import make_checkpoint
from tnllm_export.bundle.engines import ENGINES
from tnllm_export.export import export_bundle
from tnllm_export.progress import Progress, silent

NAME = "engines"
MEMORY_LIMIT = 24 * 2**30
WEIGHTS = ("embedded", "external", "stripped")
OPTIONS = ("--max-batch", "8", "--max-prompt", "512")
DTYPE, LOWERING = "float16", "matmul"

WALL, PROCESSOR, PEAK = "time, both engines", "processor time", "peak resident memory"
PREFILL, DECODE = "prefill engine", "decode engine"

_BUILD = r"""
import atexit, json, pathlib, re, resource
from tnllm_export.cli.main import main

def print_cost():
    # Not getrusage's maximum: it outlives exec, so it would be that of the process which started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak": 1024 * peak, "processor": used.ru_utime + used.ru_stime}))

atexit.register(print_cost)
main()
"""


@dataclass(frozen=True)
class Build:
    """What one build took: seconds, seconds of all cores, bytes; and the bytes of its engines."""

    wall: float
    processor: float
    peak: int
    prefill: int
    decode: int


def run(progress: Progress = silent, size: str = "1B", rounds: int = 3) -> list[Record]:
    """Export a random checkpoint of a size among `scale.SHAPES`, and build its engines with each kind of weights."""
    with tempfile.TemporaryDirectory(prefix="tnllm-engines-", dir=os.environ.get("TNLLM_BENCH_DIR")) as folder:
        checkpoint, bundle = Path(folder, "checkpoint"), Path(folder, "bundle")
        make_checkpoint(checkpoint, size, "safetensors")
        export_bundle(checkpoint, bundle, dtype=DTYPE, lowering=LOWERING, progress=progress)
        shutil.rmtree(checkpoint)
        builds: dict[str, list[Build]] = {weights: [] for weights in WEIGHTS}
        for done in range(rounds):
            progress(f"building the engines of {size}", done, rounds, "rounds")
            for weights, found in builds.items():
                found.append(build(bundle, weights))
        progress(f"building the engines of {size}", rounds, rounds, "rounds")
    return [record for weights, found in builds.items() for record in _records(f"{size} | {weights}", found)]


def build(bundle: Path, weights: str) -> Build:
    """Run `tnllm build` on a bundle, and remove the engines."""
    arguments = ["build", str(bundle), "--weights", weights, *OPTIONS, "--json"]
    start = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", _BUILD, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    wall = time.perf_counter() - start
    document, _, cost = answer.stdout.strip().rpartition("\n")
    files = json.loads(document)["files"]
    shutil.rmtree(bundle / ENGINES)
    return Build(
        wall=wall, prefill=files["prefill.engine"]["bytes"], decode=files["decode.engine"]["bytes"], **json.loads(cost)
    )


def _records(case: str, builds: list[Build]) -> list[Record]:
    tools = versions(("torch", "onnx", "tensorrt-rtx-cu13"))
    first = builds[0]
    found = (
        (WALL, "s", statistics.median(build.wall for build in builds), None),
        (PROCESSOR, "s", statistics.median(build.processor for build in builds), None),
        (PEAK, "GiB", max(build.peak for build in builds) / 2**30, MEMORY_LIMIT / 2**30),
        (PREFILL, "MB", first.prefill / 1e6, None),
        (DECODE, "MB", first.decode / 1e6, None),
    )
    return [
        Record(NAME, case, metric, unit, value, floor=floor, versions=tools) for metric, unit, value, floor in found
    ]
