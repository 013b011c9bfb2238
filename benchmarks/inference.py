"""Inference of the 7B and the 1B shape, random bfloat16 weights, through the torch runtime on one GPU.

Decode is timed in three ways. "generation" is what users get: greedy tokens of `Generator`, which starts each step
before the host has seen the token it feeds. "host included" is a greedy loop: the runtime's decode with tokens from the
host, the choice of the next token, and its way back; the peers go through the same loop. "graph only" is the captured
step replayed. The floor of a token is all weights read once and the state read and written once, at the measured
bandwidth of a copy; that of a prefill its FLOP (`prefill_flops`) at the measured rate of a bfloat16 matrix product.
"""

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.attention import chip_records
from benchmarks.gpu_timing import ceilings, describe, milliseconds
from benchmarks.inference_context import context_records
from benchmarks.inference_models import (
    InPlace,
    Step,
    generation_milliseconds,
    loop_milliseconds,
    prefill,
    program_step,
    random_model,
    runtime_step,
    time_limit,
)
from benchmarks.inference_parity import parity_records
from benchmarks.inference_plan import (
    GENERATION,
    PEAK,
    RATE,
    TOKEN_TIME,
    Plan,
    Size,
    prefill_flops,
    release,
    state_bytes,
    token_floor,
    weight_bytes,
)
from benchmarks.names import COMPILED, DEVICE_ONLY, HOST, INFERENCE, OURS, PYTORCH, UNCAPTURED
from benchmarks.records import Record, gpu_versions
from tnllm_export.bench.gate import agrees_ahead
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import TorchRuntime
from tnllm_export.runtime.decode_graphs import decode_step

NAME = "inference"

HEADROOM = 2**30
"""Bytes above weights and state that decoding one sequence may take."""

Times = dict[str, tuple[float, float]]
"""Ours and the floor, by case."""


def run(progress: Progress = silent, plan: Plan | None = None) -> Iterator[Record]:
    """Check parity, then measure each size; what takes long to compile comes last."""
    plan = plan or Plan()
    deadline = time.monotonic() + plan.limit_s
    yield from chip_records(plan.device)
    times: Times = {}
    with torch.no_grad(), use_kernels(plan.kernels):
        progress("inference, parity", 0, 1)
        plan = replace(plan, batches=(yield from parity_records(plan)))
        for place, size in enumerate(plan.sizes):
            progress(f"inference, {size.name}", place, len(plan.sizes), "sizes")
            model = random_model(size.config, plan.dtype, plan.device)
            for part in (memory_records, decode_records, prefill_records, context_records):
                try:
                    _check_time(f"{size.name}, {part.__name__}", deadline)
                    for record in part(size, model, plan):
                        if record.metric == TOKEN_TIME and record.value and record.floor:
                            times[record.case] = record.value, record.floor
                        yield record
                except Exception as error:
                    traceback.print_exc()
                    yield _absent(f"{size.name} | {part.__name__}", OURS, describe(error))
                release(plan.device)
            del model
            release(plan.device)
        progress("inference", len(plan.sizes), len(plan.sizes), "sizes")
        for size in reversed(plan.sizes if plan.compiled else ()):
            yield from compiled_records(size, plan, times, deadline)
            release(plan.device)


def memory_records(size: Size, model: TransnormerForCausalLM, plan: Plan) -> Iterator[Record]:
    """Peak memory of reading two pieces of (at most) 512 tokens and decoding 16, and of a prefill of a whole piece."""
    weights, state = weight_bytes(model), state_bytes(size.config, 1)
    short = min(512, plan.piece // 2)
    ids = _ids(size, 1, plan.piece)

    def generate() -> None:
        runtime = TorchRuntime(model, capture=plan.capture)
        found = runtime.initial_state(1)
        for start in (0, short):
            _, found = prefill(runtime, ids[:, start : start + short], found, start)
        loop_milliseconds(runtime_step(runtime, found), 1, 2 * short, budget_s=0, warm_up=11)

    def prefill_piece() -> None:
        runtime = TorchRuntime(model, capture=plan.capture)
        prefill(runtime, ids, runtime.initial_state(1))

    works: tuple[tuple[str, Callable[[], None], float | None], ...] = (
        ("decode, B 1", generate, weights + state + HEADROOM), (f"prefill of {plan.piece} tokens", prefill_piece, None),
    )  # fmt: skip
    for what, work, limit in works:
        peaks = _peaks(work, plan.device)
        for metric, peak in peaks.items():
            yield Record(INFERENCE, f"{size.name} | {what}", metric, "GiB", peak / 2**30,
                         None if limit is None else limit / 2**30, "weights and state", (weights + state) / 2**30,
                         gpu_versions())  # fmt: skip


def decode_records(size: Size, model: TransnormerForCausalLM, plan: Plan) -> Iterator[Record]:
    """Time per token: the runtime's, a user's, the graph's, and the model's without a graph and without our kernels."""
    for batch in plan.batches:
        floor = token_floor(weight_bytes(model), *[state_bytes(size.config, batch)] * 2, plan.device)
        runtime = TorchRuntime(model, capture=plan.capture)
        ours = loop_milliseconds(runtime_step(runtime, runtime.initial_state(batch)), batch, plan.contexts[0])
        yield from _token_records(size, batch, HOST, ours, floor, {})
        if not agrees_ahead(runtime, batch):
            raise ArithmeticError(f"{_case(size, batch, GENERATION)}: steps ahead choose other tokens than calls")
        generated = generation_milliseconds(runtime, batch, plan.generated)
        yield from _token_records(size, batch, GENERATION, generated, floor, {})
        replayed = graph_milliseconds(model, batch, plan)
        yield from _token_records(size, batch, DEVICE_ONLY, replayed, floor, {})
        for form, kernels in ((UNCAPTURED, plan.kernels), (PYTORCH, "pytorch")):
            with use_kernels(kernels):
                eager = TorchRuntime(model, capture=None)
                step = runtime_step(eager, eager.initial_state(batch))
                found = loop_milliseconds(step, batch, plan.contexts[0], budget_s=0.2)
            yield from _token_records(size, batch, HOST, ours, floor, {form: found})
        del runtime, eager, step
        release(plan.device)


def graph_milliseconds(model: TransnormerForCausalLM, batch: int, plan: Plan) -> float:
    """Return the time of the captured step of `batch` sequences, replayed."""
    ids = torch.full((batch, 1), 5, device=plan.device)
    positions = torch.full((batch,), plan.contexts[0], device=plan.device)
    states, step = model.initial_state(batch), decode_step(model, batch)
    captured = plan.captures()(lambda: step(ids, positions, states))
    return milliseconds([captured.replay], plan.device)


def prefill_records(size: Size, model: TransnormerForCausalLM, plan: Plan) -> Iterator[Record]:
    """Time and rate of a prefill, and the time to the first token."""
    ids, flops = _ids(size, 1, max(plan.prompts)), prefill_flops(size.config, plan.piece)
    runtime = TorchRuntime(model, capture=plan.capture)
    zero = runtime.initial_state(1)
    piece = ids[:, : plan.piece]
    found = milliseconds([lambda: prefill(runtime, piece, zero)], plan.device, least=3)
    with use_kernels("pytorch"):
        plain = milliseconds([lambda: prefill(runtime, piece, zero)], plan.device, least=1, most=2)
    ceiling, case = ceilings(plan.device).matmul, f"{size.name} | prefill of {plan.piece} tokens"
    yield Record(INFERENCE, case, "time", "ms", found, 1e3 * flops / ceiling, PYTORCH, plain, gpu_versions())
    rates = [flops / time_ms / 1e9 for time_ms in (found, plain)]
    yield Record(INFERENCE, case, RATE, "TFLOP/s", rates[0], ceiling / 1e12, PYTORCH, rates[1], gpu_versions())
    for prompt in plan.prompts:
        first = first_token_milliseconds(runtime, ids[:, :prompt])
        read = token_floor(weight_bytes(model), *[state_bytes(size.config, 1)] * 2, plan.device)
        floor = max(1e3 * prefill_flops(size.config, prompt) / ceiling, read)
        yield Record(INFERENCE, f"{size.name} | prompt of {prompt} tokens", "time to first token", "ms", first, floor,
                     versions=gpu_versions())  # fmt: skip


def first_token_milliseconds(runtime: TorchRuntime, ids: Tensor, repeats: int = 3) -> float:
    """Return the median time from a prompt on the host to its first new token on the host, once its size is known."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        logits, _ = prefill(runtime, ids, runtime.initial_state(len(ids)))
        logits.argmax(-1).cpu()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def compiled_records(size: Size, plan: Plan, times: Times, deadline: float) -> Iterator[Record]:
    """Time per token of the decode program under torch.compile with CUDA graphs; the op inside is our kernel."""
    model = random_model(size.config, plan.dtype, plan.device)
    for batch in plan.batches:
        case = _case(size, batch, HOST)
        ours, floor = times.get(case, (None, None))
        found, name = None, COMPILED
        try:
            left = _check_time(f"{size.name}, {COMPILED}, B {batch}", deadline)
            with time_limit(min(left, plan.compile_s)):
                step = compiled_step(model, batch, plan)
                loop_milliseconds(step, batch, plan.contexts[0], budget_s=0)
            found = loop_milliseconds(step, batch, plan.contexts[0])
            del step
        except Exception as error:
            name = f"{COMPILED} (absent: {describe(error)})"
        yield Record(INFERENCE, case, TOKEN_TIME, "ms", ours, floor, name, found, gpu_versions())
        torch.compiler.reset()
        release(plan.device)


def compiled_step(model: TransnormerForCausalLM, batch: int, plan: Plan) -> Step:
    """Return the decode program, compiled as a whole for this number of sequences."""
    program = torch.compile(InPlace(model, batch), mode="reduce-overhead", fullgraph=True, dynamic=False)
    return program_step(program, plan.device)


def _token_records(
    size: Size, batch: int, how: str, ours: float, floor: float, peers: dict[str, float]
) -> Iterator[Record]:  # fmt: skip
    for peer, value in (peers or {None: None}).items():
        yield Record(INFERENCE, _case(size, batch, how), TOKEN_TIME, "ms", ours, floor, peer, value, gpu_versions())


def _case(size: Size, batch: int, how: str) -> str:
    return f"{size.name} | decode, B {batch}, {how}"


def _absent(case: str, form: str, reason: str) -> Record:
    return Record(INFERENCE, case, TOKEN_TIME, "ms", None, None, f"{form} (absent: {reason})", None, gpu_versions())


def _check_time(work: str, deadline: float) -> float:
    """Say what begins and return the seconds that are left. Raises TimeoutError where there are none."""
    left = deadline - time.monotonic()
    print(f"{work}: {left:.0f} s left", file=sys.stderr, flush=True)
    if left <= 0:
        raise TimeoutError("no time left")
    return left


def _ids(size: Size, batch: int, tokens: int) -> Tensor:
    return torch.randint(size.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def _peaks(work: Callable[[], None], device: str) -> dict[str, float]:
    """Peak bytes that tensors took, and that PyTorch held for them, in all."""
    release(device)
    if device != "cuda":
        work()
        return {PEAK: 0.0}
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return {
        PEAK: float(torch.cuda.max_memory_allocated()),
        f"{PEAK}, reserved": float(torch.cuda.max_memory_reserved()),
    }
