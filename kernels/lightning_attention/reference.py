"""Ground truth: the robust recurrence, token by token, in float64 where the inputs are float64."""

import torch
from torch import Tensor

from tnllm_export.kernels.contract import accumulator_dtype


def lightning_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute S_t = exp(-s) S_{t-1} + k_t v_tᵀ, o_t = q_tᵀ S_t one token after the other.

    Args and results are those of `lightning_attention`; differentiable by autograd. Robust inference algorithm of
    arXiv 2307.14995.
    """
    B, T, H, _ = query.shape
    output = query.new_zeros(B, T, H, value.shape[3])
    state = past_state.clone()
    for t in range(T):
        step_output, step_state = lightning_attention_step_reference(
            query[:, t], key[:, t], value[:, t], slope_rate, state
        )
        # [B, 1, 1, 1]
        valid = (t < lengths)[:, None, None, None]
        state = torch.where(valid, step_state, state)
        output[:, t] = torch.where(valid[..., 0], step_output, 0)
    return output, state


def lightning_attention_step_reference(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one token: S = exp(-s) S + k vᵀ, o = qᵀ S. Args and results are those of `lightning_attention_step`."""
    wide = accumulator_dtype(query.dtype)
    decay = torch.exp(-slope_rate)[:, None, None]
    # [B, H, K, 1] * [B, H, 1, V] -> [B, H, K, V]
    state = decay * past_state + key.to(wide)[..., :, None] * value.to(wide)[..., None, :]
    output = (query.to(wide)[..., :, None] * state).sum(-2)
    return output.to(query.dtype), state.contiguous()
