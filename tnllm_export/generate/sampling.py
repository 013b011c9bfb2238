"""From logits to tokens. Pure functions on logits [B, vocab]; a token that is ruled out has logit -inf."""

import torch
from torch import Tensor

from tnllm_export.generate.params import SamplingParams


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits by `penalty` where `seen` [B, vocab] is true."""
    limits = torch.finfo(logits.dtype)
    wide = logits.double()
    # Finite whatever the penalty: of two infinities no probabilities could be made.
    penalised = torch.where(wide > 0, wide / penalty, wide * penalty).clamp(limits.min, limits.max)
    return torch.where(seen, penalised.to(logits.dtype), logits)


def top_k_tokens(logits: Tensor, k: int) -> Tensor:
    """Return the tokens of the k largest logits of each row, [B, k] in ascending order; of equal ones, any."""
    return logits.topk(k, dim=-1).indices.sort(dim=-1).values


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep each row's fewest likeliest tokens whose probabilities sum to at least `p`; at least one stays."""
    values, indices = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.double().softmax(dim=-1)
    # A token goes if those before it suffice already.
    before = probabilities.cumsum(dim=-1) - probabilities
    values = values.masked_fill(before >= p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, indices, values)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row from softmax(logits) by inverting its distribution function.

    Args:
        logits: [B, vocab], at least one of each row finite.
        uniforms: [B] float64 in [0, 1), one random number per row.

    Returns:
        Tokens [B] int64, never one of logit -inf. Where logits are NaN they mean nothing, but are of the vocabulary.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the first sum above the target belongs to a token of positive probability.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def choose(logits: Tensor, params: SamplingParams, seen: Tensor | None, uniforms: Tensor | None) -> Tensor:
    """Choose the next token of rows that share their parameters, on the device of the logits and without waiting.

    Args:
        logits: [B, vocab].
        params: Of all rows; seeds don't matter here.
        seen: The tokens so far, [B, vocab] bool; None without a repetition penalty.
        uniforms: [B] float64 in [0, 1); None for a greedy choice.

    Returns:
        Tokens [B] int64.
    """
    if seen is not None:
        logits = penalise_repetition(logits, seen, params.repetition_penalty)
    if uniforms is None:
        return logits.argmax(dim=-1)
    tokens = None
    if 0 < params.top_k < logits.shape[-1]:
        # The temperature does not change which these are, and all that follows is done for them alone.
        tokens = top_k_tokens(logits, params.top_k)
        logits = logits.gather(-1, tokens)
    # A tiny temperature would overflow: float32 easily, and float64 too where the largest logit is not 0.
    logits = (logits.double() - logits.amax(dim=-1, keepdim=True)) / params.temperature
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    drawn = draw(logits, uniforms)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]
