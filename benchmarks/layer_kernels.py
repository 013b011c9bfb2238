"""Norm, gate, split into heads and product: the fused kernels beside torch.compile of the plain forms and the floor.

The floor is what must be read and written once, at the bandwidth of a large copy in the same run. What is timed is the
GPU's work alone: calls wait in the queue behind a kernel that sleeps, so that no launch is waited for.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

from benchmarks.gpu_timing import ceilings, describe, set_count
from benchmarks.names import LAYER
from benchmarks.records import Record, gpu_versions
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.layer import gated_norm, glu_product, split_heads, srmsnorm
from tnllm_export.kernels.layer.heads import split_heads_backward_pytorch, split_heads_pytorch
from tnllm_export.kernels.layer.norm import srmsnorm_pytorch
from tnllm_export.progress import Progress, silent

NAME = LAYER
DEVICE = "cuda"

BATCH, TOKENS = 4, 8192
PARITY_TOKENS = 1025
WIDTHS = (2048, 4096, 1024)
HEAD_DIM = 128
DTYPE = torch.bfloat16

ERROR_LIMIT, PYTORCH_SHARE = 5e-3, 1.1
"""Relative error that no result may exceed, and its share of the plain form's in the same dtype."""

COMPILED, EAGER = "torch.compile", "eager PyTorch"

_CALLS, _ROUNDS, _SETS = 20, 7, 2
_SLEEP_CYCLES = 60_000_000

Run = Callable[[], Any]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Case:
    """One piece of a layer.

    Attributes:
        name: In tables.
        inputs: Parts of the width that each input [B, T, parts d] has; the gate is the last quarter of a projection.
        fused: Takes the inputs.
        plain: The same by PyTorch's own ops.
        units: Passes over a tensor [B, T, d] that forward and backward must make.
        rotated: Whether LRPE's angles come as well.
    """

    name: str
    inputs: tuple[int, ...]
    fused: Callable[..., Any]
    plain: Callable[..., Any]
    units: tuple[int, int]
    rotated: bool = False


def _gate_of(projected: Tensor) -> Tensor:
    return projected.chunk(4, dim=-1)[3]


def _heads(projected: Tensor, theta: Tensor | None = None, positions: Tensor | None = None) -> Any:
    return split_heads(projected, projected.shape[-1] // 4 // HEAD_DIM or 1, theta, positions)


def _plain_heads(projected: Tensor, theta: Tensor | None = None, positions: Tensor | None = None) -> Any:
    return split_heads_pytorch(projected, projected.shape[-1] // 4 // HEAD_DIM or 1, theta, positions)


CASES = (
    Case("norm", (1,), srmsnorm, lambda x: srmsnorm_pytorch(x, x.dtype), (2, 3)),
    Case("gate", (4, 1), gated_norm, lambda u, o: u * srmsnorm_pytorch(o, o.dtype), (3, 5)),
    Case("heads, SiLU", (4,), _heads, _plain_heads, (4, 10)),
    Case("heads, SiLU and LRPE", (4,), _heads, _plain_heads, (6, 12), rotated=True),
    Case("product", (1, 1), glu_product, lambda a, b: a * b, (3, 5)),
)


@dataclass
class Example:
    """Inputs of a case, gradients of its outputs, and what both directions are called with."""

    leaves: list[Tensor]
    angles: list[Tensor]
    grads: list[Tensor]

    def arguments(self, case: Case) -> list[Tensor]:
        """What the forward takes."""
        if case.name == "gate":
            return [_gate_of(self.leaves[0]), self.leaves[1]]
        return [*self.leaves, *self.angles]


def run(progress: Progress = silent) -> Iterator[Record]:
    """Check, then measure each piece at each width, forward and backward."""
    total, done = len(WIDTHS) * len(CASES), 0
    for width in WIDTHS:
        torch._dynamo.reset()
        for case in CASES:
            progress(f"layer kernels, {case.name}, width {width}", done, total, "cases")
            yield from measure(case, BATCH, TOKENS, width)
            torch.cuda.empty_cache()
            done += 1
    progress("layer kernels", done, total, "cases")


def measure(
    case: Case, batch: int, tokens: int, width: int, device: str = DEVICE, compiler: Compile | None = None
) -> Iterator[Record]:
    """Check one case, then time it, forward and backward, beside torch.compile and eager PyTorch.

    Raises:
        RuntimeError: A result is wrong, so there is nothing to time.
    """
    compiler = compiler or partial(torch.compile, dynamic=False)
    functorch.donated_buffer = False  # a compiled backward is called many times
    where = f"{case.name} {{}} | {batch * tokens} x {width} bfloat16"
    for name, found, plain in errors(case, example(case, 1, min(tokens, PARITY_TOKENS), width, device)):
        if not found <= min(ERROR_LIMIT, PYTORCH_SHARE * plain + 1e-6):
            raise RuntimeError(f"{case.name}, width {width}: relative error of {name} {found:.1e}, plain {plain:.1e}")
        yield Record(NAME, where.format(name), "relative error", "1", found, ERROR_LIMIT, EAGER, plain,
                     versions=gpu_versions())  # fmt: skip
    unit = batch * tokens * width * DTYPE.itemsize
    count = max(_SETS, set_count(unit * case.units[0])) if device == "cuda" else 1
    examples = [example(case, batch, tokens, width, device, seed) for seed in range(count)]
    for direction, make, units in zip(("forward", "backward"), (forward, backward), case.units, strict=True):
        floor = 1e3 * unit * units / ceilings(device).bandwidth
        ours = queued_milliseconds([make(case, case.fused, one) for one in examples], device)
        for peer in (COMPILED, EAGER):
            value, note = None, ""
            try:
                calls = [make(case, case.plain, one) for one in examples]
                if peer == COMPILED:
                    calls = _compiled_calls(case, direction, make, compiler, examples)
                value = queued_milliseconds(calls, device)
            except Exception as error:  # the peer's failure is a result too
                note = f" (absent: {describe(error)})"
            yield Record(NAME, where.format(direction), "time", "ms", ours, floor, peer + note, value,
                         versions=gpu_versions())  # fmt: skip


def example(case: Case, batch: int, tokens: int, width: int, device: str, seed: int = 0) -> Example:
    """Draw inputs and gradients."""
    torch.manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=DTYPE)

    leaves = [draw(batch, tokens, parts * width).requires_grad_() for parts in case.inputs]
    angles: list[Tensor] = []
    if case.rotated:
        heads = width // HEAD_DIM or 1
        theta = 10000 ** (-2 / width * torch.arange(width, dtype=torch.float32, device=device))
        positions = torch.arange(tokens, device=device).expand(batch, tokens).contiguous()
        angles = [theta.reshape(heads, 1, width // heads).requires_grad_(), positions]
    made = Example(leaves, angles, [])
    with torch.no_grad():
        outputs = _tuple(case.fused(*made.arguments(case)))
    made.grads = [draw(*output.shape) for output in outputs]
    return made


def forward(case: Case, function: Callable[..., Any], given: Example) -> Run:
    """The forward alone, as in inference."""
    arguments = given.arguments(case)

    def call() -> Any:
        with torch.no_grad(), use_kernels("triton"):
            return function(*arguments)

    return call


def backward(case: Case, function: Callable[..., Any], given: Example) -> Run:
    """The backward alone, through autograd; a gate's gradient is its own, not the projection's."""
    arguments = [argument.detach().requires_grad_(argument.requires_grad) for argument in given.arguments(case)]
    wanted = [argument for argument in arguments if argument.requires_grad]
    with use_kernels("triton"):
        outputs = _tuple(function(*arguments))

    def call() -> Any:
        with use_kernels("triton"):
            return torch.autograd.grad(outputs, wanted, given.grads, retain_graph=True)

    return call


def errors(case: Case, given: Example) -> Iterator[tuple[str, float, float]]:
    """Relative error of ours and of the plain form, of every output and gradient, against float64."""

    def results(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        arguments = [
            argument.detach()
            .to(dtype if argument.dtype == DTYPE else argument.dtype)
            .requires_grad_(argument.is_floating_point())
            for argument in given.arguments(case)
        ]
        outputs = _tuple(function(*arguments))
        wanted = [argument for argument in arguments if argument.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, wanted, [grad.to(dtype) for grad in given.grads])]

    with use_kernels("triton"):
        ours = results(case.fused, DTYPE)
    plain, truth = results(case.plain, DTYPE), results(case.plain, torch.float64)
    for index, (one, other, reference) in enumerate(zip(ours, plain, truth, strict=True)):
        name = f"output {index}" if index < len(given.grads) else f"gradient {index - len(given.grads)}"
        norm = reference.double().norm()
        yield (
            name,
            ((one.double() - reference).norm() / norm).item(),
            ((other.double() - reference).norm() / norm).item(),
        )


def _compiled_calls(
    case: Case, direction: str, make: Callable[..., Run], compiler: Compile, examples: Sequence[Example]
) -> list[Run]:
    if direction == "backward" and case.name.startswith("heads"):
        # Two of its outputs are views, whose gradients a compiled function would leave to autograd's own additions. In
        # a compiled layer they are part of the graph; so the whole backward is compiled as one function.
        function = compiler(split_heads_backward_pytorch)
        return [partial(_explicit_heads_backward, function, one) for one in examples]
    function = compiler(case.plain)
    return [make(case, function, one) for one in examples]


def _explicit_heads_backward(function: Callable[..., Any], given: Example) -> Any:
    theta, positions = given.angles or (None, None)
    projected = given.leaves[0]
    heads = projected.shape[-1] // 4 // HEAD_DIM or 1
    with torch.no_grad():
        return function(tuple(given.grads), projected, heads, theta, positions, theta is not None)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def queued_milliseconds(calls: Sequence[Run], device: str) -> float:
    """Return the median time of one call on the GPU, without what the host needs to launch it."""
    for call in calls:
        call()
    if device != "cuda":
        start = time.perf_counter()
        calls[0]()
        return 1e3 * (time.perf_counter() - start)
    cycles, longest = _SLEEP_CYCLES, 16 * _SLEEP_CYCLES
    times: list[float] = []
    # The first round also finds the memory for the results.
    while len(times) <= _ROUNDS:
        milliseconds, ran_dry = _queue(calls, cycles)
        if ran_dry and cycles < longest:
            cycles *= 2
        else:
            times.append(milliseconds)
    return statistics.median(times[1:])


def _queue(calls: Sequence[Run], cycles: int) -> tuple[float, bool]:
    """Time per call of a queue of calls, and whether the GPU began before all of them were in it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    start.record()
    # Results are kept, so that each call writes to memory of its own.
    kept = [calls[index % len(calls)]() for index in range(_CALLS)]
    end.record()
    ran_dry = start.query()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / len(kept), ran_dry
