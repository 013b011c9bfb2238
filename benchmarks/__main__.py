"""`python -m benchmarks [NAME …]` runs benchmarks and saves results; `report` makes the docs' tables and plots."""

import sys
from collections.abc import Callable

from benchmarks import constant_cost, drift, report, scale
from benchmarks.records import Record, save
from tnllm_export.progress import Progress

REGISTRY: dict[str, Callable[[Progress], list[Record]]] = {
    module.NAME: module.run for module in (drift, constant_cost, scale)
}


def show(stage: str, done: int, total: int, unit: str = "") -> None:
    print(f"{stage}: {done} of {total} {unit}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    if arguments == ["report"]:
        report.write()
        return
    for name in arguments or REGISTRY:
        if name not in REGISTRY:
            sys.exit(f"error: no benchmark {name!r}; there are: {', '.join(REGISTRY)}, and report")
        path = save(REGISTRY[name](show))
        print(f"{name}: {path}")
    report.write()


if __name__ == "__main__":
    main(sys.argv[1:])
