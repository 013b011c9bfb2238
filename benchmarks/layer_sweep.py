"""Times every launch worth trying of the layer's kernels: `python -m benchmarks.layer_sweep [WIDTH …]`.

What it finds best belongs into the tables of `kernels/layer/triton_kernels/`.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.gpu_timing import ceilings
from benchmarks.layer_kernels import (
    BATCH,
    CASES,
    DEVICE,
    DTYPE,
    HEAD_DIM,
    TOKENS,
    WIDTHS,
    Example,
    Run,
    example,
    queued_milliseconds,
)
from tnllm_export.kernels.layer.norm import EPSILON
from tnllm_export.kernels.layer.triton_kernels import gate, glu, heads, norm
from tnllm_export.kernels.layer.triton_kernels.rows import Launch, Tile, launch_for


def sweep(
    width: int, batch: int = BATCH, tokens: int = TOKENS, device: str = DEVICE, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """Time every launch worth trying of every kernel, or so many; the table's own comes first."""
    launches = [
        Launch(rows, warps, per_processor, stages)
        for per_processor, stages in ((0, 1), (4, 2), (8, 2))
        for rows in (1, 2, 4, 8)
        for warps in (2, 4, 8, 16)
        if 8 <= rows * width // (32 * warps) <= 32
    ]
    tiles = [Tile(elements, warps) for elements in (1024, 2048, 4096, 8192) for warps in (4, 8)]
    examples = {case.name: [example(case, batch, tokens, width, device, seed) for seed in range(2)] for case in CASES}

    def norm_forward(launch: Any, given: Example) -> Run:
        return partial(norm.srmsnorm_triton, given.leaves[0].detach(), DTYPE, EPSILON, launch)

    def norm_backward(launch: Any, given: Example) -> Run:
        return partial(norm.srmsnorm_backward_triton, given.grads[0], given.leaves[0].detach(), EPSILON, launch)

    def gate_forward(launch: Any, given: Example) -> Run:
        u, o = (x.detach() for x in given.arguments(CASES[1]))
        return partial(gate.gated_norm_triton, u, o, EPSILON, launch)

    def gate_backward(launch: Any, given: Example) -> Run:
        u, o = (x.detach() for x in given.arguments(CASES[1]))
        return partial(gate.gated_norm_backward_triton, given.grads[0], u, o, EPSILON, launch)

    def product_backward(tile: Any, given: Example) -> Run:
        return partial(glu.glu_product_backward_triton, given.grads[0], *(x.detach() for x in given.leaves), tile)

    def heads_forward(tile: Any, given: Example) -> Run:
        theta, positions = (x.detach() for x in given.angles) if given.angles else (None, None)
        return partial(
            heads.split_heads_triton, given.leaves[0].detach(), width // HEAD_DIM or 1, theta, positions, tile
        )

    def heads_backward(tile: Any, given: Example) -> Run:
        theta, positions = (x.detach() for x in given.angles) if given.angles else (None, None)
        arguments = (given.leaves[0].detach(), width // HEAD_DIM or 1, theta, positions, theta is not None)
        return partial(heads.split_heads_backward_triton, tuple(given.grads), *arguments, tile)

    plan: list[tuple[str, str, Callable[..., Run], list[Any]]] = [
        ("norm forward", "norm", norm_forward, [launch_for(norm.FORWARD, width), *launches]),
        ("norm backward", "norm", norm_backward, [launch_for(norm.BACKWARD, width), *launches]),
        ("gate forward", "gate", gate_forward, [launch_for(gate.FORWARD, width), *launches]),
        ("gate backward", "gate", gate_backward, [launch_for(gate.BACKWARD, width), *launches]),
        ("product backward", "product", product_backward, [glu.BACKWARD, *tiles]),
        ("heads forward", "heads, SiLU", heads_forward, [heads.FORWARD[False], *tiles]),
        ("heads backward", "heads, SiLU", heads_backward, [heads.BACKWARD[False], *tiles]),
        ("LRPE forward", "heads, SiLU and LRPE", heads_forward, [heads.FORWARD[True], *tiles]),
        ("LRPE backward", "heads, SiLU and LRPE", heads_backward, [heads.BACKWARD[True], *tiles]),
    ]
    for name, source, make, candidates in plan:
        case = next(case for case in CASES if case.name == source)
        units = case.units["backward" in name]
        floor = 1e3 * units * batch * tokens * width * DTYPE.itemsize / ceilings(device).bandwidth
        for candidate in candidates[:most]:
            ms = queued_milliseconds([make(candidate, given) for given in examples[source]], device)
            yield {"kernel": name, "width": width, "launch": str(candidate), "ms": ms, "of floor": floor / ms}


def main(arguments: list[str]) -> None:
    for width in [int(argument) for argument in arguments] or WIDTHS[:1]:
        found: dict[str, list[dict[str, Any]]] = {}
        for result in sweep(width):
            found.setdefault(result["kernel"], []).append(result)
        for kernel, results in found.items():
            print(f"{kernel}, width {width}; the table's: {_line(results[0])}; the best:")
            for result in sorted(results[1:], key=lambda result: float(result["ms"]))[:6]:
                print(f"  {_line(result)}")
        sys.stdout.flush()


def _line(result: dict[str, Any]) -> str:
    return f"{result['ms']:.4f} ms, {result['of floor']:.0%} of the floor, {result['launch']}"


if __name__ == "__main__":
    main(sys.argv[1:])
