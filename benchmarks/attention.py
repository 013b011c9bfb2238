"""Attention over many tokens: error, time and memory of ours and of every peer, in one run on one GPU.

For each shape, errors against float64 come first; what is wrong is not timed. Gradients are those of query, key and
value. Peers keep the final state as ours does, where they can.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.attention_cases import (
    ERROR_LIMITS,
    LAYERS,
    MIDDLE_LAYER,
    PARITY_SHAPES,
    SHAPES,
    Inputs,
    Results,
    Shape,
    make_inputs,
    reference_results,
    run_op,
)
from benchmarks.attention_peers import Form, available_forms
from benchmarks.attention_warm_up import compile_ahead, tune_again
from benchmarks.gpu_timing import ceilings, describe, graph_milliseconds, milliseconds, peak_bytes, set_count
from benchmarks.names import BACKWARD, BLOCKED, CHIP, FORWARD, GRAPH, LAUNCHED, MEMORY, OURS, PARITY
from benchmarks.records import Record, gpu_versions
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.progress import Progress, silent

NAME = "attention"
DEVICE = "cuda"

PEER_ERROR_LIMIT = 2e-2
"""Beyond this a peer computes something else, and its time means nothing."""

GRAPH_TOKENS = 8192
"""Up to here launches matter, and calls are also timed in a CUDA graph."""

_TUNE_AT = {
    "1, 32, 1024": (Shape(1, 32, 2048),),
    "1, 32, 16384": (Shape(1, 32, 16384), Shape(8, 16, 4096), Shape(1, 32, 16384, key_dim=256)),
}
"""Peers that tune themselves do so at first sight of H, K and V, for all T: they tune before short and long shapes."""


@dataclass
class Measured:
    """What one shape gave: values by form, and reasons why there is none."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    times: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def run(progress: Progress = silent) -> Iterator[Record]:
    """Measure every shape on the GPU."""
    yield from chip_records()
    forms, absent = available_forms()
    compile_ahead(progress)
    yield from parity_records()
    for done, shape in enumerate(SHAPES):
        progress(f"attention, {shape}", done, len(SHAPES), "shapes")
        if str(shape) in _TUNE_AT:
            tune_again(forms, _TUNE_AT[str(shape)])
        try:
            measured = measure(shape, forms, absent)
        except Exception as error:
            print(f"attention, {shape}: {describe(error)}", file=sys.stderr)
        else:
            yield from shape_records(shape, measured)
        torch.cuda.empty_cache()
    progress("attention", len(SHAPES), len(SHAPES), "shapes")


def chip_records(device: str = DEVICE) -> list[Record]:
    """What the chip can do, in this run."""
    chip, versions = ceilings(device), gpu_versions()
    return [
        Record(CHIP, "copy within the device", "bytes read plus written", "TB/s", chip.bandwidth / 1e12,
               versions=versions),
        Record(CHIP, "bfloat16 matrix product", "rate", "TFLOP/s", chip.matmul / 1e12, versions=versions),
    ]  # fmt: skip


def parity_records(device: str = DEVICE, shapes: tuple[Shape, ...] = PARITY_SHAPES) -> Iterator[Record]:
    """Errors of ours beside the blocked PyTorch form: every dtype, the fastest and slowest decay, a past state."""
    forms = {OURS: "triton" if device == "cuda" else "auto", BLOCKED: "pytorch"}
    for shape in shapes:
        for dtype in ERROR_LIMITS:
            for layer in (0, MIDDLE_LAYER, LAYERS - 1):
                inputs = make_inputs(shape, dtype, device, layer=layer, continued=True)
                reference = reference_results(inputs)
                measured = Measured()
                for form, kernels in forms.items():
                    try:
                        with use_kernels(kernels):
                            measured.errors[form] = run_op(inputs).errors(reference)
                    except Exception as error:
                        measured.absent[form] = describe(error)
                yield from _error_records(f"{shape} | {_name(dtype)} | layer {layer}, past state", measured, dtype)


def measure(shape: Shape, forms: list[Form], absent: dict[str, str], device: str = DEVICE) -> Measured:
    """Check and time every form on one shape in bfloat16.

    Args:
        shape: The shape.
        forms: What to measure.
        absent: Why forms that are not among them are missing.
        device: Where.
    """
    measured = Measured(absent=dict(absent))
    sets = [make_inputs(shape, torch.bfloat16, device)]
    reference = reference_results(sets[0])
    count = set_count(sets[0].bytes) if device == "cuda" else 2
    sets += [make_inputs(shape, torch.bfloat16, device, seed=seed) for seed in range(1, count)]
    for form in forms:
        try:
            with form.chosen():
                _measure_form(form, sets, reference, measured, device)
        except Exception as error:
            measured.absent.setdefault(form.name, describe(error))
        if device == "cuda":
            torch.cuda.empty_cache()
    return measured


def _measure_form(form: Form, sets: list[Inputs], reference: Results, measured: Measured, device: str) -> None:
    shape = sets[0].shape
    first = form.prepare(sets[0])
    if form.linear:
        errors = first.results().errors(reference)
        measured.errors[form.name] = errors
        limit = ERROR_LIMITS[torch.bfloat16] if form.name == OURS else PEER_ERROR_LIMIT
        # Not `> limit`: NaN must not pass.
        wrong = {name: error for name, error in errors.items() if not error <= limit}
        if wrong:
            measured.absent[form.name] = f"wrong: {', '.join(f'{name} {error:.1e}' for name, error in wrong.items())}"
            return
    prepared = [first, *(form.prepare(inputs) for inputs in sets[1:])]
    measured.memory[form.name] = (peak_bytes(first.forward_backward, device) + first.bytes) / 2**30
    for metric, calls in (
        (FORWARD, [one.forward for one in prepared]),
        (BACKWARD, [one.forward_backward for one in prepared]),
    ):
        measured.times.setdefault((metric, LAUNCHED), {})[form.name] = milliseconds(calls, device)
        if device == "cuda" and shape.tokens <= GRAPH_TOKENS and form.name != BLOCKED:
            graph = measured.times.setdefault((metric, GRAPH), {})
            try:
                graph[form.name] = graph_milliseconds(calls)
            except Exception as error:
                measured.absent[f"{form.name}, {metric}, {GRAPH}"] = describe(error)
                torch.cuda.synchronize()


def shape_records(shape: Shape, measured: Measured, device: str = DEVICE) -> Iterator[Record]:
    """Turn what one shape gave into records: ours beside each peer."""
    yield from _error_records(f"{shape} | bfloat16 | layer {MIDDLE_LAYER}", measured, torch.bfloat16)
    bandwidth = ceilings(device).bandwidth
    floors = {FORWARD: shape.forward_bytes(), BACKWARD: shape.forward_bytes() + shape.backward_bytes()}
    for (metric, how), times in measured.times.items():
        floor = 1e3 * floors[metric] / bandwidth
        for peer, value in _peers(times, measured.absent, metric, how):
            yield _record(metric, f"{shape} | {how}", "time", "ms", times.get(OURS), floor, peer, value)
    for peer, value in _peers(measured.memory, measured.absent, MEMORY, ""):
        yield _record(MEMORY, str(shape), "peak memory", "GiB", measured.memory.get(OURS), None, peer, value)


def _error_records(case: str, measured: Measured, dtype: torch.dtype) -> Iterator[Record]:
    ours = measured.errors.get(OURS, {})
    for quantity in dict.fromkeys(name for errors in measured.errors.values() for name in errors):
        found = {form: errors[quantity] for form, errors in measured.errors.items() if quantity in errors}
        for peer, value in _peers(found, measured.absent, PARITY, ""):
            label = quantity.replace("_", " ")
            yield _record(PARITY, f"{case} | {label}", "relative error", "1", ours.get(quantity), ERROR_LIMITS[dtype],
                          peer, value)  # fmt: skip


def _peers(
    values: dict[str, float], absent: dict[str, str], metric: str, how: str
) -> Iterator[tuple[str, float | None]]:
    """Each peer with its value, then those that have none with the reason; ours too, where it has none."""
    yield from ((form, value) for form, value in values.items() if form != OURS)
    for form, reason in absent.items():
        name, *particular = form.split(", ", 1)
        if name not in values and (not particular or particular == [f"{metric}, {how}"]) and metric != PARITY:
            yield f"{name} (absent: {reason})", None


def _record(
    name: str, case: str, metric: str, unit: str, value: float | None, floor: float | None, peer: str,
    peer_value: float | None,
) -> Record:  # fmt: skip
    return Record(name, case, metric, unit, value, floor, peer, peer_value, gpu_versions())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
