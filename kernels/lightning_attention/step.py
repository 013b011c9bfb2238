"""The decode step in PyTorch, without the drift that rounding to float32 brings over a long context.

The slowest heads of the last layers have s near 4e-8, and two roundings would then grow with the number of tokens:

- exp(-s) lies between two neighbouring float32 numbers, and the nearer one is wrong by up to half of 1 - exp(-s). So a
  slow head adds the small change, S + (expm1(-s) S + k vᵀ), where expm1(-s) has full relative precision. A fast head,
  where that sum would cancel, keeps exp(-s) S + k vᵀ. Both are one formula: keep S + (change S + k vᵀ).
- The change is less than half a unit in the last place of S. It survives the last rounding only by what k vᵀ happens to
  add below that place, and products of bfloat16 numbers have nothing there: it would be lost every time. So the change
  is dithered by up to half a unit, in a way that looks random, has mean zero and is a function of the value alone
  (values are as often negative as positive, and the dither of -v is that of v negated).
"""

import math

import torch
from torch import Tensor

from tnllm_export.kernels.contract import accumulator_dtype

SLOW_RATE = math.log(2)
"""Below this rate a head loses less than half of its state per token and counts as slow."""

DITHER = 2.0**-24
"""Amplitude of the dither relative to the state: half a unit in the last place of a float32 number, at most."""

DITHER_FREQUENCY = 40503.53
"""Values are multiplied by this and lose their integer part; what is left looks random for values of any dtype."""


def lightning_attention_step_pytorch(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute S = exp(-s) S + k vᵀ and o = qᵀ S for one token. Args and results are those of the op."""
    wide = accumulator_dtype(query.dtype)
    # [B, H, 1, V]
    v = value.to(wide)[..., None, :]
    # [H, 1, 1] each
    keep, change = (factor[:, None, None] for factor in decay_factors(slope_rate))
    if wide == torch.float32:
        change = change + keep * dither(v)
    # [B, H, K, 1] * [B, H, 1, V] -> [B, H, K, V]
    update = key.to(wide)[..., :, None] * v
    state = keep * past_state + (change * past_state + update)
    # [B, H, 1, K] @ [B, H, K, V] -> [B, H, V]
    output = (query.to(wide)[..., None, :] @ state)[..., 0, :]
    return output.to(query.dtype).contiguous(), state.contiguous()


def decay_factors(slope_rate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (keep, change), [H] each, with keep + change = exp(-slope_rate) and keep either 0 or 1."""
    slow = slope_rate < SLOW_RATE
    return slow.to(slope_rate.dtype), torch.where(slow, torch.expm1(-slope_rate), torch.exp(-slope_rate))


def dither(value: Tensor) -> Tensor:
    """Return numbers between -DITHER and DITHER, of value's shape, float32; 0 for a value of 0."""
    turns = value * DITHER_FREQUENCY + 0.5
    return (2 * (turns - turns.floor()) - 1) * DITHER
