"""The two ops as torch.library ops: one node each under torch.export and torch.compile."""

from typing import Any

import torch
from torch import Tensor

from tnllm_export.kernels.contract import (
    LIGHTNING_ATTENTION,
    LIGHTNING_ATTENTION_STEP,
    check_chunk_inputs,
    check_step_inputs,
)
from tnllm_export.kernels.lightning_attention.blocked import (
    lightning_attention_blocked,
    lightning_attention_blocked_backward,
)
from tnllm_export.kernels.lightning_attention.step import lightning_attention_step_pytorch


def _like(x: Tensor) -> Tensor:
    """Results are contiguous, whatever the strides of the inputs."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(LIGHTNING_ATTENTION.qualified_name, mutates_args=())
def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Lightning attention over many tokens: S_t = exp(-s) S_{t-1} + k_t v_tᵀ; o_t = q_tᵀ S_t.

    No scale, no denominator. Differentiable in everything but lengths. Source: arXiv 2401.04658, with the released
    TransNormerLLM's per-head decay.

    Args:
        query: [B, T, H, K] float32, float16, bfloat16 or float64.
        key: [B, T, H, K], same dtype.
        value: [B, T, H, V], same dtype.
        slope_rate: [H] float32 (float64 beside float64), s >= 0.
        past_state: [B, H, K, V] float32 (float64 beside float64).
        lengths: [B] int32; tokens at t >= lengths[b] change no state and give 0.

    Returns:
        output [B, T, H, V] in the activations' dtype, and present_state [B, H, K, V] float32 (float64).

    Raises:
        ValueError: A shape does not fit.
        TypeError: A dtype does not fit.
    """
    check_chunk_inputs(query, key, value, slope_rate, past_state, lengths)
    return lightning_attention_blocked(query, key, value, slope_rate, past_state, lengths)


@lightning_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    check_chunk_inputs(query, key, value, slope_rate, past_state, lengths)
    return _like(value), _like(past_state)


@torch.library.custom_op(LIGHTNING_ATTENTION.qualified_name + "_backward", mutates_args=())
def lightning_attention_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lightning_attention`; see `lightning_attention_blocked_backward`."""
    return lightning_attention_blocked_backward(
        grad_output, grad_state, query, key, value, slope_rate, past_state, lengths
    )


@lightning_attention_backward.register_fake
def _(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value), _like(slope_rate), _like(past_state)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    return *lightning_attention_backward(grad_output, grad_state, *ctx.saved_tensors), None


lightning_attention.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op(LIGHTNING_ATTENTION_STEP.qualified_name, mutates_args=())
def lightning_attention_step(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one decoded token by the robust recurrence: S = exp(-s) S + k vᵀ; o = qᵀ S.

    For inference: it has no backward; train with `lightning_attention`. Source: arXiv 2307.14995, robust inference.

    Args:
        query: [B, H, K] float32, float16, bfloat16 or float64.
        key: [B, H, K], same dtype.
        value: [B, H, V], same dtype.
        slope_rate: [H] float32 (float64 beside float64), s >= 0.
        past_state: [B, H, K, V] float32 (float64 beside float64).

    Returns:
        output [B, H, V] in the activations' dtype, and present_state [B, H, K, V] float32 (float64).

    Raises:
        ValueError: A shape does not fit.
        TypeError: A dtype does not fit.
    """
    check_step_inputs(query, key, value, slope_rate, past_state)
    return lightning_attention_step_pytorch(query, key, value, slope_rate, past_state)


@lightning_attention_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor) -> tuple[Tensor, Tensor]:
    check_step_inputs(query, key, value, slope_rate, past_state)
    return _like(value), _like(past_state)
