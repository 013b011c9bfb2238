"""`python -m benchmarks [NAME …]` runs benchmarks and saves results; `report` makes the docs' tables and plots.

`--output FILE` puts results into another file and leaves the docs alone; `merge FILE` takes over results that were so
measured on another machine, FILE being named after its device.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path

from benchmarks.records import RESULTS, load, results_path, save

# Modules are imported when they run: a GPU machine needs no ONNX Runtime.
REGISTRY = {
    "drift": "cpu",
    "constant cost": "cpu",
    "scale": "cpu",
    "engines": "cpu",
    "attention": "cuda",
    "decode": "cuda",
    "training": "cuda",
    "layer kernels": "cuda",
    "decode layer": "cuda",
    "inference": "cuda",
    "onnxruntime inference": "cuda",
    "onnxruntime lowerings": "cuda",
    "plugin": "cuda",
}
"""Benchmarks and the device that each needs."""


def show(stage: str, done: int, total: int, unit: str = "") -> None:
    print(f"{stage}: {done} of {total} {unit}", file=sys.stderr, flush=True)


def run(name: str, output: Path | None = None) -> Path:
    """Run one benchmark and save its records as they come."""
    module = importlib.import_module(f"benchmarks.{name.replace(' ', '_')}")
    return save(module.run(show), output or results_path(REGISTRY[name]))


def main(arguments: list[str]) -> None:
    output = None
    if "--output" in arguments:
        place = arguments.index("--output")
        output = Path(arguments[place + 1])
        arguments = arguments[:place] + arguments[place + 2 :]
    if arguments[:1] == ["merge"]:
        for file in arguments[1:]:
            save(load(Path(file)), RESULTS / Path(file).name)
    elif arguments != ["report"]:
        for name in arguments:
            if name not in REGISTRY:
                sys.exit(f"error: no benchmark {name!r}; there are: {', '.join(REGISTRY)}, report and merge")
        failed = [name for name in arguments or _runnable() if not _ran(name, output)]
        if failed:
            sys.exit(f"error: failed: {', '.join(failed)}; what they had measured is kept")
    if output is None:
        importlib.import_module("benchmarks.report").write()


def _ran(name: str, output: Path | None) -> bool:
    """Run one benchmark and say whether it ended well; one that breaks does not stop the others."""
    try:
        print(f"{name}: {run(name, output)}", flush=True)
    except Exception:
        traceback.print_exc()
        return False
    return True


def _runnable() -> list[str]:
    """All benchmarks for which there is a device."""
    import torch  # noqa: PLC0415

    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available():
        return list(REGISTRY)
    left_out = [name for name, device in REGISTRY.items() if device == "cuda"]
    print(f"left out, for want of a CUDA device: {', '.join(left_out)}", file=sys.stderr)
    return [name for name in REGISTRY if name not in left_out]


if __name__ == "__main__":
    main(sys.argv[1:])
