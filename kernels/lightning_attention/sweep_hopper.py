"""The sweep (see `sweep.py`) for Hopper GPUs, bfloat16 and key rows of 64 or 128: the same cut, the same arithmetic.

Triton's own pipelining starts a chunk's loads when the chunk before it is done, and waits for each matrix product.
Here, in Gluon, Triton's lower level, copies and matrix products run behind the arithmetic:

    scores = K Qᵀ           while the state is taken in two parts
    O = S Qᵀ                while the scores are scaled
    O += Vᵀ scores          while the values decay
    S = decay S + Vᵀ K      while O is written

and the copy engine fills one buffer of queries, keys and values while the other is used. A program of four warps owns
64 columns of the state; two programs share a multiprocessor, one computing where the other waits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# triton 3.7 renamed it.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

C = gl.constexpr(64)  # tokens per chunk
BV = gl.constexpr(64)  # columns of the state
LOG2_E = gl.constexpr(1.4426950408889634)
SLOW_RATE = gl.constexpr(0.6931471805599453)
FACTORED_RATE = gl.constexpr(1.0)  # up to it, a chunk's decay and its inverse are far from the ends of float32
NEGLIGIBLE = gl.constexpr(40.0)  # exp(-40) is 4e-18: what has decayed so far is not looked at
STATE_STAGES = gl.constexpr(4)
STAGES = gl.constexpr(2)


# One variant for all numbers of tokens, heads and chunks.
@gluon.jit(do_not_specialize=("T", "H"))
def sweep_hopper_kernel(  # noqa: D103, PLR0912, PLR0915
    p_query,
    p_key,
    p_value,
    p_slope_rate,
    p_past_state,
    p_lengths,
    p_output,
    p_present_state,
    p_carry,
    p_progress,
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
    K: gl.constexpr,
    V: gl.constexpr,
    REVERSE: gl.constexpr,
    HANDOVER: gl.constexpr,
    STORE_STATE: gl.constexpr,
):
    NV: gl.constexpr = V // BV
    row_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], gl.bfloat16)
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], gl.bfloat16)
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    chunk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])

    heads = gl.num_programs(0)
    segments = gl.num_programs(1)
    if HANDOVER == "lookback":
        ticket = gl.atomic_add(p_progress, 1, sem="relaxed")
        i_segment = ticket // heads
        i_column = ticket % heads
    else:
        i_segment = gl.program_id(1)
        i_column = gl.program_id(0)
    i_v = i_column % NV
    i_b = (i_column // NV) // H
    i_h = (i_column // NV) % H

    length = gl.maximum(gl.minimum(gl.load(p_lengths + i_b), T), 0)
    n_chunks = (length + C - 1) // C
    slope = gl.load(p_slope_rate + i_h)
    segment_chunks = gl.maximum((n_chunks + segments - 1) // segments, 1)
    n_segments = gl.maximum((n_chunks + segment_chunks - 1) // segment_chunks, 1)
    first = i_segment * segment_chunks
    end = gl.minimum(first + segment_chunks, n_chunks)

    p_output += i_b.to(gl.int64) * output_stride_b + i_h.to(gl.int64) * output_stride_h
    output = tma.make_tensor_descriptor(p_output, [T, V], [output_stride_t, 1], [C, BV], value_tile)

    # 4 buffers of [C, K]: keys, or two of keys and two of queries. 4 of [C, BV]: values, or two of values and two parts
    # of the scores, whose first also takes the output.
    rows = gl.allocate_shared_memory(gl.bfloat16, [4, C, K], row_tile)
    columns = gl.allocate_shared_memory(gl.bfloat16, [4, C, BV], value_tile)
    score_high = columns.index(2)
    barriers = gl.allocate_shared_memory(gl.int64, [STATE_STAGES + STAGES, 1], mbarrier.MBarrierLayout())
    for i_barrier in gl.static_range(STATE_STAGES + STAGES):
        mbarrier.init(barriers.index(i_barrier), count=1)
    fence_async_shared()
    _barrier()

    # Padding: this program's share of the chunks without a valid token.
    padding = (T + C - 1) // C - n_chunks
    padding_from = n_chunks + padding * i_segment // segments
    padding_to = n_chunks + padding * (i_segment + 1) // segments
    if padding_from < padding_to:
        score_high.store(gl.full([C, BV], 0.0, gl.bfloat16, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
        fence_async_shared()
        _barrier()
        for i_chunk in range(padding_from, padding_to):
            tma.async_copy_shared_to_global(output, [i_chunk * C, i_v * BV], score_high)
        tma.store_wait(0)
        _barrier()

    if i_segment < n_segments:
        p_query += i_b.to(gl.int64) * query_stride_b + i_h.to(gl.int64) * query_stride_h
        p_key += i_b.to(gl.int64) * key_stride_b + i_h.to(gl.int64) * key_stride_h
        p_value += i_b.to(gl.int64) * value_stride_b + i_h.to(gl.int64) * value_stride_h
        tokens = gl.maximum(length, 1)
        query = tma.make_tensor_descriptor(p_query, [tokens, K], [query_stride_t, 1], [C, K], row_tile)
        key = tma.make_tensor_descriptor(p_key, [tokens, K], [key_stride_t, 1], [C, K], row_tile)
        value = tma.make_tensor_descriptor(p_value, [tokens, V], [value_stride_t, 1], [C, BV], value_tile)
        column = i_v * BV

        k_index = gl.arange(0, K, layout=gl.SliceLayout(0, state_layout))
        v_index = column + gl.arange(0, BV, layout=gl.SliceLayout(1, state_layout))
        p_past_state += i_b.to(gl.int64) * past_stride_b + i_h.to(gl.int64) * past_stride_h
        p_past = p_past_state + k_index[None, :] * past_stride_k + v_index[:, None] * past_stride_v

        # [BV, K], as in `sweep.py`
        if HANDOVER == "none":
            _load(query, key, value, rows, columns, barriers, first, 0, end, column, n_chunks, REVERSE)
            _load(query, key, value, rows, columns, barriers, first + 1, 1, end, column, n_chunks, REVERSE)
            # Else the compiler takes the loop's first state for a product that is under way, and waits in each chunk.
            state = warpgroup_mma_wait(0, deps=(gl.load(p_past),))
        elif HANDOVER == "recompute":
            state = _walk(
                gl.load(p_past),
                key,
                value,
                rows,
                columns,
                barriers,
                slope,
                0,
                first,
                column,
                n_chunks,
                length,
                state_layout,
                REVERSE,
            )
            _load(query, key, value, rows, columns, barriers, first, 0, end, column, n_chunks, REVERSE)
            _load(query, key, value, rows, columns, barriers, first + 1, 1, end, column, n_chunks, REVERSE)
        else:
            local_v = gl.arange(0, BV, layout=gl.SliceLayout(1, state_layout))
            p_slots = p_carry + i_column.to(gl.int64) * (K * BV) + local_v[:, None] * K + k_index[None, :]
            slot_stride = heads.to(gl.int64) * (K * BV)
            p_ready = p_progress + 1 + i_column
            state = gl.zeros([BV, K], gl.float32, state_layout)
            if i_segment < n_segments - 1:
                state = _walk(
                    state,
                    key,
                    value,
                    rows,
                    columns,
                    barriers,
                    slope,
                    first,
                    end,
                    column,
                    n_chunks,
                    length,
                    state_layout,
                    REVERSE,
                )
            _load(query, key, value, rows, columns, barriers, first, 0, end, column, n_chunks, REVERSE)
            _load(query, key, value, rows, columns, barriers, first + 1, 1, end, column, n_chunks, REVERSE)
            before = gl.zeros([BV, K], gl.float32, state_layout)
            if i_segment == 0:
                before = gl.load(p_past)
            if i_segment < n_segments - 1:
                state += _decayed(before, slope * _tokens(i_segment, segment_chunks, n_chunks, length, REVERSE))
                gl.store(p_slots + i_segment * slot_stride, state, cache_modifier=".cg")
                # All threads' stores come before the release.
                _barrier()
                gl.atomic_add(p_ready + i_segment * heads, 1, sem="release")
            state = before
            i_before = i_segment
            since = i_segment * 0
            while (i_before > 0) & (slope * since < NEGLIGIBLE):
                i_before -= 1
                ready = gl.atomic_add(p_ready + i_before * heads, 0, sem="acquire")
                while ready == 0:
                    ready = gl.atomic_add(p_ready + i_before * heads, 0, sem="acquire")
                _barrier()
                state += _decayed(gl.load(p_slots + i_before * slot_stride, cache_modifier=".cg"), slope * since)
                since += _tokens(i_before, segment_chunks, n_chunks, length, REVERSE)

        # A head that forgets within few tokens would overflow what the others count backwards.
        if slope <= FACTORED_RATE:
            state = _answer(
                state, query, key, value, output, rows, columns, barriers, slope, first, end, column, n_chunks, length,
                state_layout, chunk_layout, REVERSE, True,
            )  # fmt: skip
        else:
            state = _answer(
                state, query, key, value, output, rows, columns, barriers, slope, first, end, column, n_chunks, length,
                state_layout, chunk_layout, REVERSE, False,
            )  # fmt: skip
        tma.store_wait(0)

        if STORE_STATE:  # noqa: SIM102
            if i_segment == n_segments - 1:
                p_present_state += i_b.to(gl.int64) * present_stride_b + i_h.to(gl.int64) * present_stride_h
                p_present = p_present_state + k_index[None, :] * present_stride_k
                gl.store(p_present + v_index[:, None] * present_stride_v, state)


@gluon.jit
def _answer(  # noqa: PLR0915
    state,
    query,
    key,
    value,
    output,
    rows,
    columns,
    barriers,
    slope,
    first,
    end,
    column,
    n_chunks,
    length,
    state_layout: gl.constexpr,
    chunk_layout: gl.constexpr,
    REVERSE: gl.constexpr,
    FACTORED: gl.constexpr,
):
    """Write the output of chunks `first` to `end`, whose first buffers are being filled; return the state after them.

    Within a chunk, o_i = d_i (S q_i + Σ_j s_ij v_j / d_j), d_i being the decay from the chunk's start to token i: with
    FACTORED scores are divided by d_j, all products add up in one accumulator, and d_i comes last. Else each score is
    multiplied by its own d_i / d_j, which never overflows.
    """
    state_operand: gl.constexpr = gl.DotOperandLayout(0, chunk_layout, 2)
    value_operand: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    score_high = columns.index(2)
    score_low = columns.index(3)
    key_row = gl.arange(0, C, layout=gl.SliceLayout(1, chunk_layout)).to(gl.float32)
    query_row = gl.arange(0, C, layout=gl.SliceLayout(0, chunk_layout)).to(gl.float32)
    value_row = gl.arange(0, C, layout=gl.SliceLayout(0, value_operand)).to(gl.float32)
    debt = slope * 0.0
    for i in range(first, end):
        n = i - first
        stage = n % STAGES
        t0 = _chunk_start(i, n_chunks, REVERSE)
        count = gl.minimum(length - t0, C)
        # Computed anew for each chunk (count is always positive): registers are scarcer than exponentials.
        rate = gl.where(count > 0, -slope * LOG2_E, 0.0)
        k = rows.index(stage)
        q = rows.index(STAGES + stage).permute((1, 0))
        v = columns.index(stage).permute((1, 0))
        mbarrier.wait(barriers.index(STATE_STAGES + stage), (n // STAGES) & 1)

        empty = gl.zeros([C, C], gl.float32, chunk_layout)
        scores = warpgroup_mma(k, q, empty, use_acc=False, is_async=True)
        high, low = _parts(state, state_operand)
        o = warpgroup_mma(high, q, gl.zeros([BV, C], gl.float32, chunk_layout), use_acc=False, is_async=True)
        o = warpgroup_mma(low, q, o, is_async=True)

        # [C, C]: rows are keys, columns queries. Exponents of d.
        if REVERSE:
            seen = key_row[:, None] >= query_row[None, :]
            key_exponent = rate * (count - 1 - key_row)
            query_exponent = rate * (count - 1 - query_row)
        else:
            seen = query_row[None, :] >= key_row[:, None]
            key_exponent = rate * (key_row + 1)
            query_exponent = rate * (query_row + 1)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        if FACTORED:
            scores = gl.where(seen, scores * gl.exp2(-key_exponent)[:, None], 0.0)
        else:
            scores = scores * gl.where(seen, gl.exp2(query_exponent[None, :] - key_exponent[:, None]), 0.0)
        scores_high, scores_low = _split(scores)
        # The output that the buffer held has left it.
        tma.store_wait(0)
        _barrier()
        score_high.store(scores_high)
        score_low.store(scores_low)
        fence_async_shared()
        _barrier()

        if FACTORED:
            o = warpgroup_mma(v, score_high, o, is_async=True)
            o = warpgroup_mma(v, score_low, o, is_async=True)
            o, high, low = warpgroup_mma_wait(2, deps=(o, high, low))
        else:
            o, high, low = warpgroup_mma_wait(0, deps=(o, high, low))
            o = o * gl.exp2(gl.minimum(query_exponent, 0.0))[None, :]
            o = warpgroup_mma(v, score_high, o, is_async=True)
            o = warpgroup_mma(v, score_low, o, is_async=True)

        state, v_high, v_low, debt = _advance(state, debt, k, v, slope, rate, count, value_row, value_operand, REVERSE)

        o = warpgroup_mma_wait(2, deps=(o,))
        if FACTORED:
            o = o * gl.exp2(query_exponent)[None, :]
        # Every warp is done with the scores.
        _barrier()
        # A query beyond the last valid token is 0, and so is its output.
        score_high.permute((1, 0)).store(o.to(gl.bfloat16))
        fence_async_shared()
        _barrier()
        tma.async_copy_shared_to_global(output, [t0, column], score_high)
        state, v_high, v_low = warpgroup_mma_wait(0, deps=(state, v_high, v_low))
        # Every warp is done with the buffers.
        _barrier()
        _load(query, key, value, rows, columns, barriers, i + STAGES, stage, end, column, n_chunks, REVERSE)
    return state


@gluon.jit
def _walk(
    state,
    key,
    value,
    rows,
    columns,
    barriers,
    slope,
    begin,
    end,
    column,
    n_chunks,
    length,
    state_layout: gl.constexpr,
    REVERSE: gl.constexpr,
):
    """The state after chunks `begin` to `end`, without output: one long sum of values that decay until the end."""
    # First and last token.
    if REVERSE:
        low = (n_chunks - end) * C
        high = gl.minimum((n_chunks - begin) * C, length) - 1
    else:
        low = begin * C
        high = gl.minimum(end * C, length) - 1
    state = _decayed(state, slope * gl.maximum(high + 1 - low, 0))
    remembered = 1.0 / gl.maximum(slope * C, 1e-6) * NEGLIGIBLE
    begin = gl.maximum(begin, end - remembered.to(gl.int32) - 2)
    if begin < end:
        rate = -slope * LOG2_E
        for early in gl.static_range(STATE_STAGES):
            _load_state(key, value, rows, columns, barriers, begin + early, early, end, column, n_chunks, REVERSE)
        odd = (end - begin) & 1
        if odd != 0:
            upper, lower = _decayed_values(
                columns, barriers, 0, begin, 0, rate, low, high, n_chunks, state_layout, REVERSE
            )
            sum_ = warpgroup_mma(upper, rows.index(0), state, is_async=True)
            sum_ = warpgroup_mma(lower, rows.index(0), sum_, is_async=True)
            state, upper, lower = warpgroup_mma_wait(0, deps=(sum_, upper, lower))
            _barrier()
            _load_state(key, value, rows, columns, barriers, begin + STATE_STAGES, 0, end, column, n_chunks, REVERSE)
        for i in range(begin + odd, end, 2):
            n = i - begin
            stage = n % STATE_STAGES
            other = (n + 1) % STATE_STAGES
            # The operands of a product stay where they are until it is done: the loop begins with none under way.
            upper, lower = _decayed_values(
                columns, barriers, stage, i, (n // STATE_STAGES) & 1, rate, low, high, n_chunks, state_layout, REVERSE
            )
            sum_ = warpgroup_mma(upper, rows.index(stage), state, is_async=True)
            sum_ = warpgroup_mma(lower, rows.index(stage), sum_, is_async=True)
            other_upper, other_lower = _decayed_values(
                columns,
                barriers,
                other,
                i + 1,
                ((n + 1) // STATE_STAGES) & 1,
                rate,
                low,
                high,
                n_chunks,
                state_layout,
                REVERSE,
            )
            sum_ = warpgroup_mma(other_upper, rows.index(other), sum_, is_async=True)
            sum_ = warpgroup_mma(other_lower, rows.index(other), sum_, is_async=True)
            state, upper, lower, other_upper, other_lower = warpgroup_mma_wait(
                0, deps=(sum_, upper, lower, other_upper, other_lower)
            )
            # Every warp is done with both chunks.
            _barrier()
            ahead = i + STATE_STAGES
            _load_state(key, value, rows, columns, barriers, ahead, stage, end, column, n_chunks, REVERSE)
            _load_state(key, value, rows, columns, barriers, ahead + 1, other, end, column, n_chunks, REVERSE)
    _barrier()
    return state


@gluon.jit
def _decayed_values(
    columns, barriers, stage, i, phase, rate, low, high, n_chunks, state_layout: gl.constexpr, REVERSE: gl.constexpr
):
    """Wait for a chunk and take its values, [BV, C], decayed until the end of the walk, in two parts."""
    operand: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    token = _chunk_start(i, n_chunks, REVERSE) + gl.arange(0, C, layout=gl.SliceLayout(0, operand))
    left = token - low + 1 if REVERSE else high - token
    decay = gl.exp2(rate * gl.maximum(left, 0))
    mbarrier.wait(barriers.index(stage), phase)
    return _split(columns.index(stage).permute((1, 0)).load(operand).to(gl.float32) * decay[None, :])


@gluon.jit
def _advance(state, debt, k, v, slope, rate, count, value_row, value_operand: gl.constexpr, REVERSE: gl.constexpr):
    """Start to bring the state past a chunk of `count` tokens; the products' operands must outlive it."""
    exponent = rate * value_row
    exponent = exponent + rate if REVERSE else gl.minimum(rate * (count - 1) - exponent, 0.0)
    # [BV, C]
    decayed_v = v.load(value_operand).to(gl.float32) * gl.exp2(exponent)[None, :]
    high, low = _split(decayed_v)
    # What rounding the decay leaves out is owed to the next chunk: else a slow head would drift.
    keep, change = _decay_factors(slope * count)
    owed = change + debt
    decay = keep + owed
    debt = (keep - decay) + owed
    state = warpgroup_mma(high, k, state * decay, is_async=True)
    return warpgroup_mma(low, k, state, is_async=True), high, low, debt


@gluon.jit
def _decayed(state, rate):
    """As `arithmetic.decayed`."""
    keep, change = _decay_factors(rate)
    return state * keep + state * change


@gluon.jit
def _parts(x, layout: gl.constexpr):
    """Two bfloat16 tiles in an operand's layout whose sum is x but for 2^-16 of it."""
    high, low = _split(x)
    return gl.convert_layout(high, layout), gl.convert_layout(low, layout)


@gluon.jit
def _split(x):
    """Two bfloat16 tiles whose sum is x but for 2^-16 of it."""
    high = (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    return high.to(gl.bfloat16), (x - high).to(gl.bfloat16)


@gluon.jit
def _decay_factors(rate):
    """As `arithmetic.decay_factors`."""
    series = -rate * (1.0 - rate * (0.5 - rate * (0.16666667 - rate * (0.041666668 - rate * 0.008333334))))
    decay = gl.exp2(-rate * LOG2_E)
    slow = rate < SLOW_RATE
    change = gl.where(slow, gl.where(rate < 0.1, series, decay - 1.0), decay)
    return gl.where(slow, 1.0, 0.0), change


@gluon.jit
def _tokens(i_segment, segment_chunks, n_chunks, length, REVERSE: gl.constexpr):
    """As `sweep.segment_tokens`."""
    if REVERSE:
        left = n_chunks - i_segment * segment_chunks
        return gl.minimum(left * C, length) - (left - segment_chunks) * C
    return segment_chunks * C


@gluon.jit
def _chunk_start(i, n_chunks, REVERSE: gl.constexpr):
    """First token of the i-th chunk on the way."""
    return ((n_chunks - 1 - i) if REVERSE else i) * C


@gluon.jit
def _load(query, key, value, rows, columns, barriers, i, stage, end, column, n_chunks, REVERSE: gl.constexpr):
    """Start to copy the i-th chunk, if there is one, into the buffers of a stage."""
    wanted = i < end
    t0 = _chunk_start(i, n_chunks, REVERSE)
    barrier = barriers.index(STATE_STAGES + stage)
    mbarrier.expect(barrier, key.block_type.nbytes * 2 + value.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(key, [t0, 0], barrier, rows.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(query, [t0, 0], barrier, rows.index(STAGES + stage), pred=wanted)
    tma.async_copy_global_to_shared(value, [t0, column], barrier, columns.index(stage), pred=wanted)


@gluon.jit
def _load_state(key, value, rows, columns, barriers, i, stage, end, column, n_chunks, REVERSE: gl.constexpr):
    """Start to copy key and value alone."""
    wanted = i < end
    t0 = _chunk_start(i, n_chunks, REVERSE)
    barrier = barriers.index(stage)
    mbarrier.expect(barrier, key.block_type.nbytes + value.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(key, [t0, 0], barrier, rows.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(value, [t0, column], barrier, columns.index(stage), pred=wanted)
