"""The decode step: ours, PyTorch's and flash-linear-attention's, with states that do not stay in the cache.

Every call gets another state, and so many of them that none is still in the L2 cache when its turn comes again; in a
CUDA graph every call also has output memory of its own.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention import chip_records
from benchmarks.attention_cases import LAYERS, MIDDLE_LAYER, Shape, relative_error
from benchmarks.gpu_timing import ceilings, describe, graph_milliseconds, milliseconds, set_count
from benchmarks.names import DECODE, DECODE_PARITY, FLA_RECURRENT, GRAPH, IN_PLACE, LAUNCHED, OURS, PYTORCH
from benchmarks.records import Record, gpu_versions
from tnllm_export.kernels.dispatch import Choice, use_kernels
from tnllm_export.kernels.lightning_attention import lightning_attention_step
from tnllm_export.models.decay import slope_rates
from tnllm_export.progress import Progress, silent

NAME = "decode"
DEVICE = "cuda"

STATE_ERROR_LIMIT, OUTPUT_ERROR_LIMIT = 5e-6, 5e-3

SHAPES = (*(Shape(batch, 32, 1) for batch in (1, 8, 64, 256)), Shape(64, 32, 1, key_dim=256))

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepForm:
    """One way to decode a token.

    Attributes:
        name: In tables.
        step: Takes the decode op's arguments and gives its results.
        kernels: What `use_kernels` is told meanwhile.
        rate_sign: -1 where it wants log decays in place of rates; changing the sign is not timed.
    """

    name: str
    step: Step
    kernels: Choice = "auto"
    rate_sign: int = 1


def run(progress: Progress = silent) -> Iterator[Record]:
    """Measure every batch size on the GPU."""
    yield from chip_records()
    forms, absent = available_steps()
    for done, shape in enumerate(SHAPES):
        progress(f"decode, batch {shape.batch}", done, len(SHAPES), "shapes")
        yield from measure(shape, forms, absent)
        torch.cuda.empty_cache()
    progress("decode", len(SHAPES), len(SHAPES), "shapes")


def available_steps() -> tuple[list[StepForm], dict[str, str]]:
    """Return the forms that can be imported, and why the others cannot."""
    forms = [StepForm(OURS, lightning_attention_step, "triton"), StepForm(PYTORCH, lightning_attention_step, "pytorch")]
    absent = {}
    for name, make, sign in ((IN_PLACE, _in_place_step, 1), (FLA_RECURRENT, _fla_step, -1)):
        try:
            forms.append(StepForm(name, make(), "triton", sign))
        except Exception as error:
            absent[name] = describe(error)
    return forms, absent


def step_bytes(shape: Shape, element_size: int = 2) -> int:
    """Bytes of a float32 state read and written once, and of q, k, v, o."""
    state = 2 * 4 * shape.key_dim * shape.value_dim
    return shape.batch * shape.heads * (state + element_size * 2 * (shape.key_dim + shape.value_dim))


def measure(
    shape: Shape, forms: list[StepForm], absent: dict[str, str], device: str = DEVICE
) -> Iterator[Record]:  # fmt: skip
    """Check and time every form on one shape: bfloat16 activations, float32 states."""
    absent, versions = dict(absent), gpu_versions()
    slope_rate = slope_rates("release", MIDDLE_LAYER, LAYERS, shape.heads).to(device)
    state_bytes = 4 * shape.batch * shape.heads * shape.key_dim * shape.value_dim
    count = max(2, set_count(state_bytes)) if device == "cuda" else 2
    sets = [_draw(shape, device, seed) for seed in range(count)]
    errors: dict[str, dict[str, float]] = {}
    times: dict[str, dict[str, float]] = {LAUNCHED: {}, GRAPH: {}}
    for form in forms:
        try:
            with use_kernels(form.kernels):
                errors[form.name] = _errors(form, sets[0], slope_rate)
                if not _right(errors[form.name]):
                    absent[form.name] = f"wrong: {errors[form.name]}"
                    continue
                calls = [_call(form.step, one, form.rate_sign * slope_rate) for one in sets]
                with torch.no_grad():
                    times[LAUNCHED][form.name] = milliseconds(calls, device)
                    if device == "cuda":
                        times[GRAPH][form.name] = graph_milliseconds(calls)
        except Exception as error:
            absent[form.name] = describe(error)
        if device == "cuda":
            torch.cuda.empty_cache()
    missing: dict[str, float | None] = {f"{name} (absent: {reason})": None for name, reason in absent.items()}

    def peers(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value for name, value in values.items() if name != OURS} | missing

    for quantity, limit in (("output", OUTPUT_ERROR_LIMIT), ("state", STATE_ERROR_LIMIT)):
        found = {name: error[quantity] for name, error in errors.items()}
        for peer, value in peers(found).items():
            case = f"{shape} | bfloat16 | {quantity}"
            yield Record(DECODE_PARITY, case, "relative error", "1", found.get(OURS), limit, peer, value, versions)
    floor = 1e6 * step_bytes(shape) / ceilings(device).bandwidth
    for how, found in times.items():
        for peer, value in peers(found).items() if found else ():
            yield Record(DECODE, f"{shape} | {how}", "time", "µs", _micro(found.get(OURS)), floor, peer, _micro(value),
                         versions)  # fmt: skip


def _draw(shape: Shape, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and state."""
    generator = torch.Generator(device).manual_seed(seed)
    B, H, K, V = shape.batch, shape.heads, shape.key_dim, shape.value_dim
    sizes = ((B, H, K), (B, H, K), (B, H, V), (B, H, K, V))
    query, key, value, state = (torch.randn(size, generator=generator, device=device) for size in sizes)
    silu = torch.nn.functional.silu
    return silu(query).bfloat16(), silu(key).bfloat16(), value.bfloat16(), state


def _call(step: Step, one: tuple[Tensor, ...], slope_rate: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    query, key, value, state = one
    return lambda: step(query, key, value, slope_rate, state)


def _errors(form: StepForm, one: tuple[Tensor, ...], slope_rate: Tensor) -> dict[str, float]:
    with use_kernels("pytorch"):
        wide = lightning_attention_step(*(x.double() for x in (*one[:3], slope_rate, one[3])))
    output, state = form.step(*one[:3], form.rate_sign * slope_rate, one[3].clone())
    return {"output": relative_error(output, wide[0]), "state": relative_error(state, wide[1])}


def _right(errors: dict[str, float]) -> bool:
    return errors["output"] <= OUTPUT_ERROR_LIMIT and errors["state"] <= OUTPUT_ERROR_LIMIT


def _micro(milliseconds_: float | None) -> float | None:
    return None if milliseconds_ is None else 1e3 * milliseconds_


def _in_place_step() -> Step:
    kernel = importlib.import_module("tnllm_export.kernels.lightning_attention.step_kernel").step

    def step(query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output = torch.empty_like(value)
        kernel(query, key, value, slope_rate, state, output, state)
        return output, state

    return step


def _fla_step() -> Step:
    kernel = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla

    def step(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, present = kernel(
            query[:, None], key[:, None], value[:, None], g_gamma=log_decay, scale=1.0, initial_state=state,
            output_final_state=True,
        )  # fmt: skip
        return output[:, 0], present

    return step
