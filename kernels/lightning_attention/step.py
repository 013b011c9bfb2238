"""The decode step in PyTorch, without the drift that rounding exp(-s) to float32 brings.

The slowest heads of the last layers have s near 4e-8: exp(-s) lies between two neighbouring float32 numbers, and the
nearer one is wrong by up to half of 1 - exp(-s). Applied once per token, that error grows with the context. So a slow
head adds the small change, S + (expm1(-s) S + k vᵀ), where expm1(-s) has full relative precision; a fast head, where
the sum would cancel, keeps exp(-s) S + k vᵀ. Both are one formula: keep S + (change S + k vᵀ).
"""

import math

import torch
from torch import Tensor

from tnllm_export.kernels.contract import accumulator_dtype

SLOW_RATE = math.log(2)
"""Below this rate a head loses less than half of its state per token and counts as slow."""


def lightning_attention_step_pytorch(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute S = exp(-s) S + k vᵀ and o = qᵀ S for one token. Args and results are those of the op."""
    wide = accumulator_dtype(query.dtype)
    keep, change = decay_factors(slope_rate)
    # [B, H, K, 1] * [B, H, 1, V] -> [B, H, K, V]
    update = key.to(wide)[..., :, None] * value.to(wide)[..., None, :]
    state = keep[:, None, None] * past_state + (change[:, None, None] * past_state + update)
    # [B, H, 1, K] @ [B, H, K, V] -> [B, H, V]
    output = (query.to(wide)[..., None, :] @ state)[..., 0, :]
    return output.to(query.dtype).contiguous(), state.contiguous()


def decay_factors(slope_rate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (keep, change), [H] each, with keep + change = exp(-slope_rate) and keep either 0 or 1."""
    slow = slope_rate < SLOW_RATE
    return slow.to(slope_rate.dtype), torch.where(slow, torch.expm1(-slope_rate), torch.exp(-slope_rate))
