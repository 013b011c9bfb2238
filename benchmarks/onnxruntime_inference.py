"""Inference of the 7B and the 1B shape, random bfloat16 weights: the torch runtime beside ONNX Runtime on CUDA.

Both have the same weights in memory and go through the same greedy loop, the host included. Parity goes first: logits
of a prompt and of decoded tokens, against those of the float32 model.
"""

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu_timing import ceilings, describe
from benchmarks.inference import first_token_milliseconds
from benchmarks.inference_models import loop_milliseconds, random_model, runtime_step
from benchmarks.inference_plan import (
    SIZES,
    TOKEN_TIME,
    Size,
    prefill_flops,
    release,
    state_bytes,
    token_floor,
    weight_bytes,
)
from benchmarks.names import ONNXRUNTIME, ORT_INFERENCE, ORT_PARITY, OURS, PYTORCH
from benchmarks.onnxruntime_models import Traced, allowed, distance, exact_logits, onnxruntime_over, trace
from benchmarks.records import Record, versions
from tnllm_export.kernels.dispatch import Choice, use_kernels
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import Runtime, TorchRuntime
from tnllm_export.runtime.cuda_graphs import Capture

NAME = ORT_INFERENCE

PARITY_RATIOS = {OURS: 1.2, ONNXRUNTIME: 1.5}
"""A runtime may be so much further from float32 than plain PyTorch in the same dtype is; 1.5 as in `tnllm verify`."""

TOOLS = ("torch", "triton", "onnxruntime-gpu", "onnxruntime")

FIRST_TOKEN = "time to first token"

_DECODE_WARM_UP = 10
"""Each of two directions is run twice and captured."""


@dataclass(frozen=True)
class OrtPlan:
    """What is compared, on what, and how long.

    Attributes:
        sizes: Models.
        batches: Sequences decoded at once.
        context: Tokens before those that are decoded.
        prompts: Lengths for the time to the first token.
        parity_tokens: Of the prompt that parity is checked on, and decoded after it.
        device: "cuda", or "cpu" to try the code out.
        dtype: Of weights and activations.
        lowering: Of ONNX Runtime's graphs.
        kernels: Of our own forms.
        capture: How the torch runtime captures.
        limit_s: What is not begun by then is left out.
    """

    sizes: tuple[Size, ...] = SIZES
    batches: tuple[int, ...] = (1, 32)
    context: int = 1024
    prompts: tuple[int, ...] = (512, 8192)
    parity_tokens: tuple[int, int] = (128, 8)
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    lowering: str = "hybrid"
    kernels: Choice = "triton"
    capture: Capture | str | None = "auto"
    limit_s: float = 140.0


def run(progress: Progress = silent, plan: OrtPlan | None = None) -> Iterator[Record]:
    """Check parity and time, size by size."""
    plan = plan or OrtPlan()
    deadline = time.monotonic() + plan.limit_s
    traces = {size.name: trace(size.config, plan.dtype) for size in plan.sizes}
    with torch.no_grad(), use_kernels(plan.kernels):
        for done, size in enumerate(plan.sizes):
            progress("ONNX Runtime beside ours", done, len(plan.sizes), "sizes")
            try:
                check_time(deadline, plan.limit_s)
                yield from _size_records(size, traces[size.name], plan)
            except Exception as error:
                traceback.print_exc()
                yield Record(NAME, f"{size.name} | all", TOKEN_TIME, "ms", None, None,
                             f"{ONNXRUNTIME} (absent: {describe(error)})", None, versions(TOOLS))  # fmt: skip
            release(plan.device)
        progress("ONNX Runtime beside ours", len(plan.sizes), len(plan.sizes), "sizes")


def check_time(deadline: float, limit_s: float) -> None:
    """Raise TimeoutError where the deadline, `limit_s` seconds after the start, has passed."""
    if time.monotonic() > deadline:
        raise TimeoutError(f"not begun after {limit_s:.0f} s")


def _size_records(size: Size, traced: Traced, plan: OrtPlan) -> Iterator[Record]:
    model = random_model(size.config, plan.dtype, plan.device)
    ours = TorchRuntime(model, capture=plan.capture)
    with onnxruntime_over(model, traced, plan.lowering) as peer:
        yield from parity_records(size, model, {OURS: ours, ONNXRUNTIME: peer}, plan)
        yield from _decode_records(size, model, ours, peer, plan)
        yield from _prefill_records(size, ours, peer, plan)


def parity_records(
    size: Size, model: TransnormerForCausalLM, runtimes: dict[str, Runtime], plan: OrtPlan
) -> Iterator[Record]:
    """Give each runtime's distance from the float32 model beside plain PyTorch's.

    Raises:
        ArithmeticError: One is further off than its ratio allows: then nothing is timed.
    """
    ids, exact, plain = exact_logits(model, plan.parity_tokens)
    found = {name: distance(runtime, exact, ids, plan.parity_tokens[0]) for name, runtime in runtimes.items()}
    limits = {name: allowed(plan.dtype, plain, PARITY_RATIOS[name]) for name in found}
    for name, value in found.items():
        yield Record(ORT_PARITY, f"{size.name} | {name}", "distance of logits from float32", "1", value,
                     limits[name], PYTORCH, plain, versions(TOOLS))  # fmt: skip
    wrong = [name for name, value in found.items() if not value <= limits[name]]
    if wrong:
        raise ArithmeticError(f"{', '.join(wrong)} differ: distances from float32 {found}, plain PyTorch's {plain:.2e}")


def _decode_records(
    size: Size, model: TransnormerForCausalLM, ours: TorchRuntime, peer: Runtime, plan: OrtPlan
) -> Iterator[Record]:
    for batch in plan.batches:
        floor = token_floor(weight_bytes(model), *[state_bytes(size.config, batch)] * 2, plan.device)
        times = [token_milliseconds(runtime, batch, plan.context) for runtime in (ours, peer)]
        yield _record(f"{size.name} | decode, B {batch}", TOKEN_TIME, floor, *times)
        release(plan.device)


def token_milliseconds(runtime: Runtime, batch: int, context: int) -> float:
    """Return what a step of `batch` sequences takes after `context` tokens, the host included."""
    step = runtime_step(runtime, runtime.initial_state(batch))
    return loop_milliseconds(step, batch, context, warm_up=_DECODE_WARM_UP)


def _prefill_records(size: Size, ours: TorchRuntime, peer: Runtime, plan: OrtPlan) -> Iterator[Record]:
    for tokens in plan.prompts:
        ids = torch.randint(size.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        floor = 1e3 * prefill_flops(size.config, tokens) / ceilings(plan.device).matmul
        times = [first_token_milliseconds(runtime, ids, repeats=5) for runtime in (ours, peer)]
        yield _record(f"{size.name} | prompt of {tokens} tokens", FIRST_TOKEN, floor, *times)
        release(plan.device)


def _record(case: str, metric: str, floor: float, ours: float, peer: float) -> Record:
    return Record(NAME, case, metric, "ms", ours, floor, ONNXRUNTIME, peer, versions(TOOLS))
