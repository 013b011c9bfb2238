"""One Triton kernel, the sweep: a decaying state carried along the tokens, forwards or backwards.

    forward   S_t = exp(-s) S_{t-1} + k_t v_tᵀ,   o_t = q_tᵀ S_t
    reverse   G_t = exp(-s) G_{t+1} + ...         (see `chunk.py`: a gradient is a sweep over other tensors)

A program owns V-columns of one head's state and one segment of the tokens, and walks it in chunks of C tokens with
matrix products (`blocked.py` has the formulas). The state at the start of its segment comes

- from `past_state`, when there is one segment;
- by walking the tokens before the segment without output (HANDOVER = "recompute"), when they are few;
- from the programs before it ("lookback"): all but the last first walk their own segments without output, the first one
  from `past_state`, the others from zero, and publish the states at their ends. Each then adds up those before it,
  decayed, nearest first, until the rest has decayed to nothing, and only then walks its segment again for the output.

A walk without output skips the tokens that have decayed to nothing at its end: heads that forget soon hardly do it.

Programs take tickets in the order in which they start, and wait only for lower tickets: no order of the hardware's
scheduler can lock them up. The sums have one fixed order, so two runs give the same bits.

Half precision. Inputs go into the tensor cores as they are. What is computed on the way (decayed values, scores, the
state) has float32 precision and would lose it as one bfloat16 operand, so it goes in two bfloat16 parts: 16 bits, and
the range of float32. float32 activations use IEEE float32 products.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import triton
import triton.language as tl

from tnllm_export.kernels.lightning_attention.arithmetic import (
    LOG2_E,
    decayed,
    product,
    product_wide_left,
    product_wide_right,
    wait_for,
)
from tnllm_export.kernels.lightning_attention.sweep_plan import WALK_COST

SHORTER = tl.constexpr(math.log2(1 - WALK_COST))  # log2 of a recomputing segment's length by that before it
NEGLIGIBLE = tl.constexpr(40.0)  # exp(-40) is 4e-18: what has decayed so far is not looked at


# One variant for all numbers of tokens and heads.
@triton.jit(do_not_specialize=("T", "H"))
def sweep_kernel(  # noqa: D103, PLR0912, PLR0915
    p_query,
    p_key,
    p_value,
    p_slope_rate,
    p_past_state,
    p_lengths,
    p_output,
    p_present_state,
    p_carry,  # [segments, B*H*NV, BK * BV] float32: states at the ends of segments, all but the last
    p_progress,  # [1 + segments * B*H*NV] int32, zero: tickets taken; which of these states are there
    T,
    H,
    query_stride_b,
    query_stride_t,
    query_stride_h,
    key_stride_b,
    key_stride_t,
    key_stride_h,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    output_stride_b,
    output_stride_t,
    output_stride_h,
    past_stride_b,
    past_stride_h,
    past_stride_k,
    past_stride_v,
    present_stride_b,
    present_stride_h,
    present_stride_k,
    present_stride_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    HANDOVER: tl.constexpr,  # "none", "recompute", "lookback"
    STORE_STATE: tl.constexpr,
    STATE_STAGES: tl.constexpr,  # chunks in flight while the state alone is computed
    STAGES: tl.constexpr,  # and with the output
):
    NV: tl.constexpr = (V + BV - 1) // BV
    heads = tl.num_programs(0)  # B*H*NV
    segments = tl.num_programs(1)
    if HANDOVER == "lookback":
        ticket = tl.atomic_add(p_progress, 1, sem="relaxed")
        i_segment = ticket // heads
        i_column = ticket % heads
    else:
        i_segment = tl.program_id(1)
        i_column = tl.program_id(0)
    i_v = i_column % NV
    i_b = (i_column // NV) // H
    i_h = (i_column // NV) % H

    length = tl.maximum(tl.minimum(tl.load(p_lengths + i_b), T), 0)
    n_chunks = (length + C - 1) // C
    slope = tl.load(p_slope_rate + i_h)
    segment_chunks = tl.maximum((n_chunks + segments - 1) // segments, 1)
    n_segments = tl.maximum((n_chunks + segment_chunks - 1) // segment_chunks, 1)
    first = i_segment * segment_chunks
    end = tl.minimum(first + segment_chunks, n_chunks)
    if HANDOVER == "recompute":
        n_segments = segments
        first = _recomputing(i_segment, segments, n_chunks)
        end = _recomputing(i_segment + 1, segments, n_chunks)

    row = tl.arange(0, C)
    k_column = tl.arange(0, BK)
    v_column = i_v * BV + tl.arange(0, BV)
    p_output += i_b.to(tl.int64) * output_stride_b + i_h.to(tl.int64) * output_stride_h
    output = tl.make_tensor_descriptor(p_output, [T, V], [output_stride_t, 1], [C, BV])

    # Padding: this program's share of the chunks without a valid token.
    padding = (T + C - 1) // C - n_chunks
    for i_chunk in range(n_chunks + padding * i_segment // segments, n_chunks + padding * (i_segment + 1) // segments):
        output.store([i_chunk * C, i_v * BV], tl.zeros([C, BV], dtype=p_output.dtype.element_ty))

    if i_segment < n_segments:
        # Beyond the last valid token and beyond K and V, loads give 0.
        p_query += i_b.to(tl.int64) * query_stride_b + i_h.to(tl.int64) * query_stride_h
        p_key += i_b.to(tl.int64) * key_stride_b + i_h.to(tl.int64) * key_stride_h
        p_value += i_b.to(tl.int64) * value_stride_b + i_h.to(tl.int64) * value_stride_h
        tokens = tl.maximum(length, 1)
        query = tl.make_tensor_descriptor(p_query, [tokens, K], [query_stride_t, 1], [C, BK])
        key = tl.make_tensor_descriptor(p_key, [tokens, K], [key_stride_t, 1], [C, BK])
        value = tl.make_tensor_descriptor(p_value, [tokens, V], [value_stride_t, 1], [C, BV])

        p_past_state += i_b.to(tl.int64) * past_stride_b + i_h.to(tl.int64) * past_stride_h
        # The state is kept transposed, [BV, BK]: so it goes from the accumulator into the next product by registers.
        p_past = p_past_state + k_column[None, :] * past_stride_k + v_column[:, None] * past_stride_v
        state_mask = (k_column < K)[None, :] & (v_column < V)[:, None]

        # [BV, BK]
        if HANDOVER == "lookback":
            slot = tl.arange(0, BV)[:, None] * BK + tl.arange(0, BK)[None, :]
            p_slots = p_carry + i_column.to(tl.int64) * (BK * BV) + slot
            slot_stride = heads.to(tl.int64) * (BK * BV)
            p_ready = p_progress + 1 + i_column
            state = tl.zeros([BV, BK], dtype=tl.float32)
            if i_segment < n_segments - 1:
                for i in tl.range(_begin(first, end, slope, C), end, num_stages=STATE_STAGES):
                    t0, count = _chunk(i, n_chunks, length, C, REVERSE)
                    k = key.load([t0, 0])
                    v = value.load([t0, i_v * BV])
                    state = _advance(state, k, v, slope, count, C, REVERSE)
            # Only the first segment reads it; the last one, which may write over it in place, waits for that.
            before = tl.zeros([BV, BK], dtype=tl.float32)
            if i_segment == 0:
                before = tl.load(p_past, mask=state_mask, other=0.0)
            if i_segment < n_segments - 1:
                state += decayed(before, slope * _tokens(i_segment, segment_chunks, n_chunks, length, C, REVERSE))
                tl.store(p_slots + i_segment * slot_stride, state, cache_modifier=".cg")
                # All threads' stores come before the release.
                tl.debug_barrier()
                tl.atomic_add(p_ready + i_segment * heads, 1, sem="release")
            state = before
            i_before = i_segment
            since = i_segment * 0  # tokens from there to here
            while (i_before > 0) & (slope * since < NEGLIGIBLE):
                i_before -= 1
                wait_for(p_ready + i_before * heads, 1)
                state += decayed(tl.load(p_slots + i_before * slot_stride, cache_modifier=".cg"), slope * since)
                since += _tokens(i_before, segment_chunks, n_chunks, length, C, REVERSE)
        else:
            state = tl.load(p_past, mask=state_mask, other=0.0)
            if HANDOVER == "recompute":
                begin = _begin(0, first, slope, C)
                if begin > 0:
                    state = decayed(state, slope * _tokens(0, begin, n_chunks, length, C, REVERSE))
                for i in tl.range(begin, first, num_stages=STATE_STAGES):
                    t0, count = _chunk(i, n_chunks, length, C, REVERSE)
                    k = key.load([t0, 0])
                    v = value.load([t0, i_v * BV])
                    state = _advance(state, k, v, slope, count, C, REVERSE)

        # [C, C]: rows are keys, columns queries.
        sees = (row[:, None] >= row[None, :]) if REVERSE else (row[None, :] >= row[:, None])
        place = -row.to(tl.float32) if REVERSE else row.to(tl.float32)
        for i in tl.range(first, end, num_stages=STAGES):
            t0, count = _chunk(i, n_chunks, length, C, REVERSE)
            q = query.load([t0, 0])
            k = key.load([t0, 0])
            v = value.load([t0, i_v * BV])
            # Computed anew for each chunk (count is always positive): registers are scarcer than exponentials.
            rate = tl.where(count > 0, -slope * LOG2_E, 0.0)
            exponent = rate * place
            intra = tl.where(sees, tl.exp2(exponent[None, :] - exponent[:, None]), 0.0)
            scores = product(k, tl.trans(q), None) * intra
            left = tl.maximum(count - 1 - row, 0) if REVERSE else row + 1
            inter = tl.exp2(rate * left)[None, :]
            # [BV, C]
            o = product_wide_left(state, tl.trans(q), None) * inter
            o = product_wide_right(tl.trans(v), scores, o)
            # A query beyond the last valid token is 0, and so is its output.
            output.store([t0, i_v * BV], tl.trans(o).to(p_output.dtype.element_ty))
            state = _advance(state, k, v, slope, count, C, REVERSE)

        if STORE_STATE:  # noqa: SIM102
            if i_segment == n_segments - 1:
                if HANDOVER == "lookback":  # noqa: SIM102
                    if i_segment > 0:
                        # In place: a head that forgets soon has not waited for the segment that reads the past state.
                        wait_for(p_ready, 1)
                p_present_state += i_b.to(tl.int64) * present_stride_b + i_h.to(tl.int64) * present_stride_h
                p_present = p_present_state + k_column[None, :] * present_stride_k
                tl.store(p_present + v_column[:, None] * present_stride_v, state, mask=state_mask)


@triton.jit
def _recomputing(i_segment, segments, n_chunks):
    """First chunk of a segment where each walks all before it: they get shorter, so that all end at once."""
    share = (1.0 - tl.exp2(i_segment * SHORTER)) / (1.0 - tl.exp2(segments * SHORTER))
    return (n_chunks * share + 0.5).to(tl.int32)


@triton.jit
def _tokens(i_segment, segment_chunks, n_chunks, length, C: tl.constexpr, REVERSE: tl.constexpr):
    """Valid tokens of a segment that is not the last one."""
    if REVERSE:  # The first segment holds the chunk that may be partly valid.
        left = n_chunks - i_segment * segment_chunks
        return tl.minimum(left * C, length) - (left - segment_chunks) * C
    return segment_chunks * C


@triton.jit
def _begin(first, end, slope, C: tl.constexpr):
    """The first of the chunks from `first` to `end` that are not forgotten at the end."""
    remembered = 1.0 / tl.maximum(slope * C, 1e-6) * NEGLIGIBLE
    return tl.maximum(first, end - remembered.to(tl.int32) - 2)


@triton.jit
def _chunk(i, n_chunks, length, C: tl.constexpr, REVERSE: tl.constexpr):
    """First token and number of valid tokens of the i-th chunk on the way."""
    t0 = ((n_chunks - 1 - i) if REVERSE else i) * C
    return t0, tl.minimum(length - t0, C)


@triton.jit
def _advance(state, k, v, slope, count, C: tl.constexpr, REVERSE: tl.constexpr):
    """The state, [BV, BK], after a chunk of `count` tokens."""
    row = tl.arange(0, C)
    left = row + 1 if REVERSE else tl.maximum(count - 1 - row, 0)
    # [BV, C]
    decayed_v = tl.trans(v).to(tl.float32) * tl.exp2(-slope * LOG2_E * left)[None, :]
    return product_wide_left(decayed_v, k, decayed(state, slope * count))
