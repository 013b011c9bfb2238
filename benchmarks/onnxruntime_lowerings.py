"""Which lowering ONNX Runtime on CUDA is quickest with: prefill and decode of the 1B shape, random weights, by dtype.

Times are those of calls from the host, tokens and logits there and back included. Memory is what the sessions have
taken beside the weights, as the driver counts, once the prompts up to that length have been fed.
"""

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu_timing import describe
from benchmarks.inference import first_token_milliseconds
from benchmarks.inference_models import loop_milliseconds, random_model, runtime_step
from benchmarks.inference_plan import PEAK, SIZES, TOKEN_TIME, Size, release
from benchmarks.names import ORT_LOWERINGS
from benchmarks.onnxruntime_inference import FIRST_TOKEN, TOOLS, check_time
from benchmarks.onnxruntime_models import Traced, allowed, distance, logits_of, onnxruntime_over, trace, used_bytes
from benchmarks.records import Record, versions
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import Runtime, TorchRuntime

NAME = ORT_LOWERINGS

EXCESS = 1.5
"""A form may be so much further from float32 than plain PyTorch in the same dtype is, as in `tnllm verify`."""

_DECODE_WARM_UP = 10


@dataclass(frozen=True)
class LoweringsPlan:
    """What is compared, and on what.

    Attributes:
        size: The model.
        dtypes: Of weights and activations.
        lowerings: The forms.
        prompts: Lengths of prompts, ascending.
        batches: Sequences decoded at once.
        parity_tokens: Of the prompt that parity is checked on, and decoded after it.
        device: "cuda", or "cpu" to try the code out.
        limit_s: What is not begun by then is left out.
    """

    size: Size = SIZES[1]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    lowerings: tuple[str, ...] = ("hybrid", "matmul", "contrib")
    prompts: tuple[int, ...] = (512, 2048, 8192)
    batches: tuple[int, ...] = (1, 32)
    parity_tokens: tuple[int, int] = (128, 8)
    device: str = "cuda"
    limit_s: float = 90.0


def run(progress: Progress = silent, plan: LoweringsPlan | None = None) -> Iterator[Record]:
    """Check parity and time, dtype by dtype and form by form."""
    plan = plan or LoweringsPlan()
    deadline = time.monotonic() + plan.limit_s
    total, done = len(plan.dtypes) * len(plan.lowerings), 0
    for dtype in plan.dtypes:
        traced = trace(plan.size.config, dtype)
        with torch.no_grad():
            model = random_model(plan.size.config, dtype, plan.device)
            ids, truth, limit = _truth(model, plan)
            for lowering in plan.lowerings:
                progress("lowerings on ONNX Runtime", done, total, "forms")
                case = f"{plan.size.name} {str(dtype).removeprefix('torch.')} | {lowering}"
                try:
                    check_time(deadline, plan.limit_s)
                    with use_kernels("pytorch"):
                        yield from _form_records(case, model, traced, lowering, (ids, truth, limit), plan)
                except Exception as error:
                    traceback.print_exc()
                    yield _record(f"{case} | all", TOKEN_TIME, "ms", None, f"{lowering} (absent: {describe(error)})")
                release(plan.device)
                done += 1
            del model
            release(plan.device)
    progress("lowerings on ONNX Runtime", done, total, "forms")


def _truth(model: TransnormerForCausalLM, plan: LoweringsPlan) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Token ids, logits of the float32 model, and how far from them a runtime may be."""
    prompt, decoded = plan.parity_tokens
    dtype = model.lm_head.weight.dtype
    ids = torch.randint(plan.size.config.vocab_size, (2, prompt + decoded), generator=torch.Generator().manual_seed(1))
    with use_kernels("pytorch"):
        exact = random_model(plan.size.config, dtype, plan.device).cast_weights(torch.float32)
        truth = logits_of(TorchRuntime(exact, capture=None), ids, prompt)
        plain = distance(TorchRuntime(model, capture=None), truth, ids, prompt)
    return ids, truth, allowed(dtype, plain, EXCESS)


def _form_records(
    case: str,
    model: TransnormerForCausalLM,
    traced: Traced,
    lowering: str,
    parity: tuple[torch.Tensor, torch.Tensor, float],
    plan: LoweringsPlan,
) -> Iterator[Record]:
    ids, truth, limit = parity
    before = used_bytes(plan.device)
    with onnxruntime_over(model, traced, lowering) as runtime:
        yield _record(f"{case} | sessions opened", PEAK, "GiB", (used_bytes(plan.device) - before) / 2**30)
        error = distance(runtime, truth, ids, plan.parity_tokens[0])
        yield _record(f"{case} | logits", "distance from float32", "1", error, floor=limit)
        if not error <= limit:
            raise ArithmeticError(f"{case}: logits are {error:.2e} from float32; at most {limit:.2e} is allowed")
        for tokens in plan.prompts:
            prompt = torch.randint(plan.size.config.vocab_size, (1, tokens))
            name = f"{case} | prompt of {tokens} tokens"
            yield _record(name, FIRST_TOKEN, "ms", first_token_milliseconds(runtime, prompt))
            yield _record(name, PEAK, "GiB", (used_bytes(plan.device) - before) / 2**30)
        for batch in plan.batches:
            yield _record(f"{case} | decode, B {batch}", TOKEN_TIME, "ms", _token_milliseconds(runtime, batch))


def _token_milliseconds(runtime: Runtime, batch: int) -> float:
    step = runtime_step(runtime, runtime.initial_state(batch))
    return loop_milliseconds(step, batch, 1024, warm_up=_DECODE_WARM_UP)


def _record(
    case: str, metric: str, unit: str, value: float | None, peer: str | None = None, floor: float | None = None
) -> Record:
    return Record(NAME, case, metric, unit, value, floor, peer, None, versions(TOOLS))
