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
from benchmarks.inference_models import random_model
from benchmarks.inference_plan import PEAK, SIZES, TOKEN_TIME, Size, release
from benchmarks.names import ORT_LOWERINGS
from benchmarks.onnxruntime_inference import FIRST_TOKEN, TOOLS, check_time, token_milliseconds
from benchmarks.onnxruntime_models import Traced, allowed, distance, exact_logits, onnxruntime_over, trace, used_bytes
from benchmarks.records import Record, versions
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import Progress, silent

NAME = ORT_LOWERINGS

EXCESS = 1.5
"""A form may be so much further from float32 than plain PyTorch in the same dtype is, as in `tnllm verify`."""

_CONTEXT = 1024
"""Tokens before those that are decoded."""


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
            ids, exact, plain = exact_logits(model, plan.parity_tokens)
            parity = ids, exact, allowed(dtype, plain, EXCESS)
            for lowering in plan.lowerings:
                progress("lowerings on ONNX Runtime", done, total, "forms")
                case = f"{plan.size.name} {str(dtype).removeprefix('torch.')} | {lowering}"
                try:
                    check_time(deadline, plan.limit_s)
                    with use_kernels("pytorch"):
                        yield from _form_records(case, model, traced, lowering, parity, plan)
                except Exception as error:
                    traceback.print_exc()
                    yield _record(f"{case} | all", TOKEN_TIME, "ms", None, f"{lowering} (absent: {describe(error)})")
                release(plan.device)
                done += 1
            del model
            release(plan.device)
    progress("lowerings on ONNX Runtime", done, total, "forms")


def _form_records(
    case: str,
    model: TransnormerForCausalLM,
    traced: Traced,
    lowering: str,
    parity: tuple[torch.Tensor, torch.Tensor, float],
    plan: LoweringsPlan,
) -> Iterator[Record]:
    ids, exact, limit = parity
    before = used_bytes(plan.device)
    with onnxruntime_over(model, traced, lowering) as runtime:
        yield _record(f"{case} | sessions opened", PEAK, "GiB", (used_bytes(plan.device) - before) / 2**30)
        error = distance(runtime, exact, ids, plan.parity_tokens[0])
        yield _record(f"{case} | logits", "distance from float32", "1", error, floor=limit)
        if not error <= limit:
            raise ArithmeticError(f"{case}: logits are {error:.2e} from float32; at most {limit:.2e} is allowed")
        for tokens in plan.prompts:
            prompt = torch.randint(plan.size.config.vocab_size, (1, tokens))
            name = f"{case} | prompt of {tokens} tokens"
            yield _record(name, FIRST_TOKEN, "ms", first_token_milliseconds(runtime, prompt))
            yield _record(name, PEAK, "GiB", (used_bytes(plan.device) - before) / 2**30)
        for batch in plan.batches:
            yield _record(f"{case} | decode, B {batch}", TOKEN_TIME, "ms", token_milliseconds(runtime, batch, _CONTEXT))


def _record(
    case: str, metric: str, unit: str, value: float | None, peer: str | None = None, floor: float | None = None
) -> Record:
    return Record(NAME, case, metric, unit, value, floor, peer, None, versions(TOOLS))
