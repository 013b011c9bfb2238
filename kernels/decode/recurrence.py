"""The recurrent step in place, its state under way before the query, key and value are there.

Same cut and arithmetic as `lightning_attention/step_kernel.py`, dither included; the compiler may fuse other products
with sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from tnllm_export.kernels.decode.overlap import launch, previous_is_done
from tnllm_export.kernels.lightning_attention.arithmetic import decay_factors
from tnllm_export.kernels.lightning_attention.launch import processors
from tnllm_export.kernels.lightning_attention.step import DITHER, DITHER_FREQUENCY
from tnllm_export.kernels.lightning_attention.step_plan import StepTile, step_tile

_DITHER = tl.constexpr(DITHER)
_DITHER_FREQUENCY = tl.constexpr(DITHER_FREQUENCY)


@triton.jit
def recurrence_kernel(
    p_query,
    p_key,
    p_value,
    p_slope_rate,
    p_state,
    p_output,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """S = exp(-s) S + k vᵀ and o = qᵀ S for V-columns of one head; all tensors are contiguous."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_head = tl.program_id(0) // NV
    i_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i_k = tl.arange(0, BK)
    k_mask, v_mask = i_k < K, i_v < V
    # [BK, BV]
    mask = k_mask[:, None] & v_mask[None, :]
    p_s = p_state + i_head.to(tl.int64) * (K * V) + i_k[:, None] * V + i_v[None, :]
    past = tl.load(p_s, mask=mask, other=0.0)
    keep, change = decay_factors(tl.load(p_slope_rate + i_head % H))
    previous_is_done(OVERLAP)
    q = tl.load(p_query + i_head * K + i_k, mask=k_mask, other=0.0).to(tl.float32)
    k = tl.load(p_key + i_head * K + i_k, mask=k_mask, other=0.0).to(tl.float32)
    v = tl.load(p_value + i_head * V + i_v, mask=v_mask, other=0.0).to(tl.float32)

    turns = v * _DITHER_FREQUENCY + 0.5
    dither = (2.0 * (turns - tl.floor(turns)) - 1.0) * _DITHER
    # [BV]
    factor = change + keep * dither
    present = keep * past + (factor[None, :] * past + k[:, None] * v[None, :])
    tl.store(p_s, present, mask=mask)
    o = tl.sum(q[:, None] * present, axis=0)
    tl.store(p_output + i_head * V + i_v, o.to(p_output.dtype.element_ty), mask=v_mask)


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    state: Tensor,
    output: Tensor,
    *,
    tile: StepTile | None = None,
    overlap: bool = True,
) -> None:
    """Launch one step of every head.

    Args:
        query, key: [B, H, K] float32, float16 or bfloat16; all tensors are contiguous.
        value: [B, H, V], same dtype.
        slope_rate: [H] float32.
        state: [B, H, K, V] float32, updated.
        output: [B, H, V] in value's dtype, written.
        tile: Sizes other than those of the rule.
        overlap: Whether it may start before the previous kernel has ended; the state must not be that one's.
    """
    B, H, K, V = state.shape
    tile = tile or step_tile(K, V, B * H, processors(state.device))
    launch(
        recurrence_kernel,
        B * H * -(-V // tile.value_block),
        (query, key, value, slope_rate, state, output),
        (H, K, V, triton.next_power_of_2(K), tile.value_block),
        tile.warps,
        overlap,
    )
