"""Both ops as `torch.library.triton_op`s that a compiler sees through: their kernels end up inside its package.

Everything that depends on the device or on typical sizes is an argument here (`PackagePlan`), and nothing branches on B
or T, which are symbolic when a program is compiled. So the chunk op always hands states over from segment to segment,
and segments have one length; and it loads by pointers, as a package has no allocator of ours for tensor maps.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP
from tnllm_export.kernels.lightning_attention.arithmetic import (
    LOG2_E,
    decayed,
    product,
    product_wide_left,
    product_wide_right,
    wait_for,
)
from tnllm_export.kernels.lightning_attention.step_kernel import step_kernel
from tnllm_export.kernels.lightning_attention.step_plan import step_tile
from tnllm_export.kernels.lightning_attention.sweep_plan import Activation, key_block, sweep_tile

SEGMENT_CHUNKS = 16
"""Chunks of a segment: 1024 tokens of 64 to the chunk, so that a short prompt waits for nobody."""


@dataclass(frozen=True)
class PackagePlan:
    """What is fixed when a package is made, in the order in which the ops take it after their tensors."""

    chunk: tuple[int, ...]
    """Tokens per chunk, columns per program, warps, stages, stages for the state alone, chunks per segment."""
    step: tuple[int, ...]
    """Columns per program, warps."""


def package_plan(K: int, V: int, heads: int, activation: Activation, capability: int, processors: int) -> PackagePlan:
    """Plan for states [K, V] of `heads` heads, and one sequence, on a GPU of this kind (90 for 9.0)."""
    tile = sweep_tile(K, V, activation, capability)
    if activation == "bfloat16":
        # Addresses take the registers that tensor maps would spare.
        tile = replace(tile, warps=8)
        if K > 128:
            tile = replace(tile, chunk=32, value_block=min(tile.value_block, 32))
    step = step_tile(K, V, heads, processors)
    return PackagePlan(
        chunk=(tile.chunk, tile.value_block, tile.warps, tile.stages, tile.state_stages, SEGMENT_CHUNKS),
        step=(step.value_block, step.warps),
    )


@triton_op(f"{LIGHTNING_ATTENTION.qualified_name}_packaged", mutates_args={})
def lightning_attention_packaged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
    chunk: int,
    value_block: int,
    warps: int,
    stages: int,
    state_stages: int,
    segment_chunks: int,
) -> tuple[Tensor, Tensor]:
    """Compute the chunk op. Tensors and results are those of `lightning_attention`, the rest a plan's `chunk`."""
    B, T, H, K = query.shape
    V = value.shape[3]
    BK = key_block(K)
    output = torch.empty((B, T, H, V), dtype=value.dtype, device=value.device)
    present_state = torch.empty((B, H, K, V), dtype=past_state.dtype, device=past_state.device)
    columns = B * H * -(-V // value_block)
    segments = (T + chunk * segment_chunks - 1) // (chunk * segment_chunks)
    carry = torch.empty((2, columns, BK, value_block), dtype=torch.float32, device=query.device)
    progress = torch.zeros((columns + 1,), dtype=torch.int32, device=query.device)
    wrap_triton(packaged_sweep_kernel)[(columns, segments, 1)](
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        slope_rate,
        past_state.contiguous(),
        lengths,
        output,
        present_state,
        carry,
        progress,
        T,
        H=H,
        K=K,
        V=V,
        BK=BK,
        BV=value_block,
        C=chunk,
        SEGMENT_CHUNKS=segment_chunks,
        STATE_STAGES=state_stages,
        STAGES=stages,
        num_warps=warps,
    )
    return output, present_state


@triton_op(f"{LIGHTNING_ATTENTION_STEP.qualified_name}_packaged", mutates_args={"state"})
def lightning_attention_step_packaged(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, state: Tensor, value_block: int, warps: int
) -> Tensor:
    """Compute the decode step and write the new state over the old one, [B, H, K, V]; return output [B, H, V]."""
    B, H, K = query.shape
    V = value.shape[2]
    output = torch.empty((B, H, V), dtype=value.dtype, device=value.device)
    wrap_triton(packaged_step_kernel)[(B * H * -(-V // value_block), 1, 1)](
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        slope_rate,
        state,
        output,
        H=H,
        K=K,
        V=V,
        BK=key_block(K),
        BV=value_block,
        num_warps=warps,
    )
    return output


@triton.jit
def packaged_step_kernel(  # noqa: D103
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
):
    # One name for the state that is read and the one that is written: a compiler then sees an update in place.
    step_kernel(
        p_query,
        p_key,
        p_value,
        p_slope_rate,
        p_state,
        p_output,
        p_state,
        H,
        H * K,
        K,
        H * K,
        K,
        H * V,
        V,
        K,
        V,
        BK,
        BV,
        False,
    )


@triton.jit
def packaged_sweep_kernel(  # noqa: PLR0915
    p_query,
    p_key,
    p_value,
    p_slope_rate,
    p_past_state,
    p_lengths,
    p_output,
    p_present_state,
    p_carry,  # [2, B*H*NV, BK*BV] float32: states on their way from one segment to the next
    p_progress,  # [1 + B*H*NV] int32, zero: tickets taken; segments passed on, per head and block of columns
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    SEGMENT_CHUNKS: tl.constexpr,
    STATE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The forward sweep of `sweep.py` over contiguous tensors; each segment waits for the state of the one before."""
    NV: tl.constexpr = (V + BV - 1) // BV
    heads = tl.num_programs(0)  # B*H*NV
    ticket = tl.atomic_add(p_progress, 1, sem="relaxed")
    i_segment = ticket // heads
    i_column = ticket % heads
    i_v = i_column % NV
    i_b = (i_column // NV) // H
    i_h = (i_column // NV) % H

    length = tl.minimum(tl.load(p_lengths + i_b), T).to(tl.int32)
    n_chunks = (length + C - 1) // C
    n_segments = tl.maximum((n_chunks + SEGMENT_CHUNKS - 1) // SEGMENT_CHUNKS, 1)
    first = i_segment * SEGMENT_CHUNKS
    end = tl.minimum(first + SEGMENT_CHUNKS, n_chunks)

    row = tl.arange(0, C)
    k_column = tl.arange(0, BK)
    v_column = i_v * BV + tl.arange(0, BV)
    start = i_b.to(tl.int64) * T * H + i_h
    p_query += start * K
    p_key += start * K
    p_value += start * V
    p_output += start * V
    # The tiles of the first chunk, [C, BK] and [C, BV], and the way to the next one in 64 bits
    key_tile = row[:, None] * (H * K) + k_column[None, :]
    value_tile = row[:, None] * (H * V) + v_column[None, :]
    key_step = start * 0 + C * H * K
    value_step = start * 0 + C * H * V
    k_mask = k_column[None, :] < K
    v_mask = v_column[None, :] < V

    # Padding: this program's share of the chunks without a valid token.
    for i in range(tl.maximum(first, n_chunks), first + SEGMENT_CHUNKS):
        nothing = tl.zeros([C, BV], dtype=p_output.dtype.element_ty)
        tl.store(p_output + i * value_step + value_tile, nothing, mask=v_mask & (i * C + row < T)[:, None])

    if i_segment < n_segments:
        slope = tl.load(p_slope_rate + i_h)
        # The state is kept transposed, [BV, BK].
        state_tile = (i_column // NV).to(tl.int64) * (K * V) + k_column[None, :] * V + v_column[:, None]
        state_mask = (k_column < K)[None, :] & (v_column < V)[:, None]
        state = tl.zeros([BV, BK], dtype=tl.float32)
        if i_segment < n_segments - 1:
            for i in tl.range(first, first + SEGMENT_CHUNKS, num_stages=STATE_STAGES):
                k = tl.load(p_key + i * key_step + key_tile, mask=k_mask, other=0.0)
                v = tl.load(p_value + i * value_step + value_tile, mask=v_mask, other=0.0)
                state = _advance(state, k, v, slope, C, C)
        p_passed_on = p_progress + 1 + i_column
        slot = tl.arange(0, BV)[:, None] * BK + tl.arange(0, BK)[None, :]
        p_slots = p_carry + i_column.to(tl.int64) * (BK * BV) + slot
        slot_stride = heads.to(tl.int64) * (BK * BV)
        if i_segment == 0:
            before = tl.load(p_past_state + state_tile, mask=state_mask, other=0.0)
        else:
            wait_for(p_passed_on, i_segment)
            before = tl.load(p_slots + (i_segment % 2) * slot_stride, cache_modifier=".cg")
        if i_segment < n_segments - 1:
            after = decayed(before, slope * (SEGMENT_CHUNKS * C)) + state
            tl.store(p_slots + ((i_segment + 1) % 2) * slot_stride, after, cache_modifier=".cg")
            # All threads' stores come before the release.
            tl.debug_barrier()
            tl.atomic_add(p_passed_on, 1, sem="release")
        state = before

        # [C, C]: rows are keys, columns queries.
        sees = row[None, :] >= row[:, None]
        for i in tl.range(first, end, num_stages=STAGES):
            valid = (i * C + row < length)[:, None]
            q = tl.load(p_query + i * key_step + key_tile, mask=k_mask & valid, other=0.0)
            k = tl.load(p_key + i * key_step + key_tile, mask=k_mask & valid, other=0.0)
            v = tl.load(p_value + i * value_step + value_tile, mask=v_mask & valid, other=0.0)
            # Computed anew for each chunk (count is always positive): registers are scarcer than exponentials.
            count = tl.minimum(length - i * C, C)
            rate = tl.where(count > 0, -slope * LOG2_E, 0.0)
            exponent = rate * row.to(tl.float32)
            intra = tl.where(sees, tl.exp2(exponent[None, :] - exponent[:, None]), 0.0)
            inter = tl.exp2(rate * (row + 1))[None, :]
            scores = product(k, tl.trans(q), None) * intra
            # [BV, C]
            o = product_wide_left(state, tl.trans(q), None) * inter
            o = product_wide_right(tl.trans(v), scores, o)
            # A query beyond the last valid token is 0, and so is its output.
            out = tl.trans(o).to(p_output.dtype.element_ty)
            tl.store(p_output + i * value_step + value_tile, out, mask=v_mask & (i * C + row < T)[:, None])
            state = _advance(state, k, v, slope, count, C)

        if i_segment == n_segments - 1:
            tl.store(p_present_state + state_tile, state, mask=state_mask)


@triton.jit
def _advance(state, k, v, slope, count, C: tl.constexpr):
    """The state, [BV, BK], after a chunk of `count` tokens."""
    left = tl.maximum(count - 1 - tl.arange(0, C), 0)
    # [BV, C]
    decayed_v = tl.trans(v).to(tl.float32) * tl.exp2(-slope * LOG2_E * left)[None, :]
    return product_wide_left(decayed_v, k, decayed(state, slope * count))
