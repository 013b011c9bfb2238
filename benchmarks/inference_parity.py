"""Whether inference is right: how far bfloat16 logits are from float32 ones, ours and plain PyTorch's."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_timing import describe
from benchmarks.inference_models import prefill, random_model
from benchmarks.inference_plan import Plan
from benchmarks.names import INFERENCE_PARITY, OURS, PYTORCH
from benchmarks.records import Record, gpu_versions
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import TorchRuntime

PARITY_RATIO = 1.2
"""Ours may be so much further from float32 than plain PyTorch in bfloat16 is."""


def parity_records(plan: Plan) -> Generator[Record, None, tuple[int, ...]]:
    """Distance of bfloat16 logits from float32 ones of the same weights, ours beside plain PyTorch's.

    Returns:
        The batches that are right; the others are not timed.

    Raises:
        ArithmeticError: Those of the first batch are further off than PARITY_RATIO allows: then nothing is.
    """
    config = plan.parity.config
    half = random_model(config, plan.dtype, plan.device)
    exact = random_model(config, plan.dtype, plan.device).cast_weights(torch.float32)
    right = []
    for batch in plan.batches:
        case = f"{plan.parity.name} shape, {config.decoder_layers} layers, B {batch}"
        try:
            found = dict(distances(exact, half, batch, plan))
        except Exception as error:
            if not right:
                raise
            yield Record(INFERENCE_PARITY, f"{case} | all", "distance of logits from float32", "1", None, None,
                         f"{OURS} (absent: {describe(error)})", None, gpu_versions())  # fmt: skip
            continue
        for what, (ours, plain) in found.items():
            yield Record(INFERENCE_PARITY, f"{case} | {what}", "distance of logits from float32", "1", ours,
                         PARITY_RATIO * plain, PYTORCH, plain, gpu_versions())  # fmt: skip
        if all(ours <= PARITY_RATIO * plain for ours, plain in found.values()):
            right.append(batch)
        elif not right:
            raise ArithmeticError(f"{case}: the distances from float32, ours and PyTorch's, are {found}")
    return tuple(right)


def distances(
    exact: TransnormerForCausalLM, half: TransnormerForCausalLM, batch: int, plan: Plan
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Give, for the prompt's last token and for the decoded ones, our distance from float32 and plain PyTorch's."""
    prompt, decoded = plan.parity_tokens
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(plan.parity.config.vocab_size, (batch, prompt + decoded), generator=generator)
    with use_kernels("pytorch"):
        truth, plain = (_answers(TorchRuntime(model, capture=None), ids, prompt) for model in (exact, half))
    ours = _answers(TorchRuntime(half, capture=plan.capture), ids, prompt)
    for what, part in ((f"last of {prompt} tokens", slice(1)), (f"{decoded} decoded tokens", slice(1, None))):
        yield what, tuple(_distance(answers[:, part], truth[:, part]) for answers in (ours, plain))


def _answers(runtime: TorchRuntime, ids: Tensor, prompt: int) -> Tensor:
    """Logits [B, 1 + decoded, vocab] after the prompt and after each further token."""
    logits, state = prefill(runtime, ids[:, :prompt], runtime.initial_state(len(ids)))
    found = [logits.cpu()]
    for position in range(prompt, ids.shape[1]):
        logits, state = runtime.decode(ids[:, position : position + 1], torch.full((len(ids),), position), state)
        found.append(logits.cpu())
    return torch.stack(found, 1)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
