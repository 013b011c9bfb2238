"""The decode step as a Triton kernel: each element of the state is read once and written once.

A program owns V-columns of one head's state, whole: it may write them where it read them. The arithmetic, dither
included, is that of `step.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from tnllm_export.kernels.lightning_attention.arithmetic import decay_factors
from tnllm_export.kernels.lightning_attention.launch import can_overlap, is_current, launch, processors
from tnllm_export.kernels.lightning_attention.step import DITHER, DITHER_FREQUENCY
from tnllm_export.kernels.lightning_attention.step_plan import StepTile, step_tile

_DITHER = tl.constexpr(DITHER)
_DITHER_FREQUENCY = tl.constexpr(DITHER_FREQUENCY)


@triton.jit
def step_kernel(  # noqa: D103
    p_query,
    p_key,
    p_value,
    p_slope_rate,
    p_past_state,
    p_output,
    p_present_state,
    H,
    query_stride_b,
    query_stride_h,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        # The next kernel starts when the last program ends: earlier, its programs would take the place of these.
        gdc_wait()
    NV: tl.constexpr = (V + BV - 1) // BV
    i_column = tl.program_id(0)
    i_v = i_column % NV
    i_head = i_column // NV
    i_b = (i_head // H).to(tl.int64)
    i_h = (i_head % H).to(tl.int64)

    k_column = tl.arange(0, BK)
    v_column = i_v * BV + tl.arange(0, BV)
    k_mask = k_column < K
    v_mask = v_column < V
    # [BK, BV]
    offsets = i_head.to(tl.int64) * (K * V) + k_column[:, None] * V + v_column[None, :]
    mask = k_mask[:, None] & v_mask[None, :]
    past = tl.load(p_past_state + offsets, mask=mask, other=0.0)
    q = tl.load(p_query + i_b * query_stride_b + i_h * query_stride_h + k_column, mask=k_mask, other=0.0)
    k = tl.load(p_key + i_b * key_stride_b + i_h * key_stride_h + k_column, mask=k_mask, other=0.0)
    v = tl.load(p_value + i_b * value_stride_b + i_h * value_stride_h + v_column, mask=v_mask, other=0.0)
    q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)

    keep, change = decay_factors(tl.load(p_slope_rate + i_h))
    turns = v * _DITHER_FREQUENCY + 0.5
    dither = (2.0 * (turns - tl.floor(turns)) - 1.0) * _DITHER
    # [BV]
    factor = change + keep * dither
    present = keep * past + (factor[None, :] * past + k[:, None] * v[None, :])
    tl.store(p_present_state + offsets, present, mask=mask)
    o = tl.sum(q[:, None] * present, axis=0)
    tl.store(p_output + i_head.to(tl.int64) * V + v_column, o.to(p_output.dtype.element_ty), mask=v_mask)


def lightning_attention_step_triton(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one token. Args and results are those of `lightning_attention_step`."""
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    present_state = torch.empty_like(past_state, memory_format=torch.contiguous_format)
    step(query, key, value, slope_rate, past_state.contiguous(), output, present_state)
    return output, present_state


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    output: Tensor,
    present_state: Tensor,
    *,
    tile: StepTile | None = None,
) -> None:
    """Launch one decode step.

    Args:
        query, key: [B, H, K] float32, float16 or bfloat16.
        value: [B, H, V], same dtype.
        slope_rate: [H] float32.
        past_state: [B, H, K, V] float32, contiguous.
        output: [B, H, V], contiguous, written.
        present_state: [B, H, K, V] float32, contiguous, written; may be `past_state`.
        tile: Sizes other than those of the rule.
    """
    B, H, K = query.shape
    V = value.shape[2]
    if B == 0 or H == 0:
        return
    device = query.device
    if not is_current(device):
        with torch.cuda.device(device):
            step(query, key, value, slope_rate, past_state, output, present_state, tile=tile)
        return
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    slope_rate = slope_rate.contiguous()
    if tile is None:
        tile = _tile(K, V, B * H, device)
    numbers = (H, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    tensors = (query, key, value, slope_rate, past_state, output, present_state)
    misalignment = tuple([x.data_ptr() % 16 for x in tensors])
    overlap = can_overlap(device)
    constants = (K, V, 1 << (K - 1).bit_length(), tile.value_block, overlap)
    grid = (B * H * -(-V // tile.value_block), 1, 1)
    key_of_launch = ("step", query.dtype, device, grid, numbers, constants, tile.warps, misalignment)
    launch(step_kernel, key_of_launch, grid, tensors + numbers, constants, tile.warps, overlap=overlap)


@cache
def _tile(K: int, V: int, heads: int, device: torch.device) -> StepTile:
    return step_tile(K, V, heads, processors(device))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
