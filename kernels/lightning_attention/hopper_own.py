"""The two groups of warps that own the state in `sweep_hopper.py`, half of a program's columns each.

What they read lies in shared memory: chunks of the tensors, and what `hopper_prepare.py` has made of them. The values
decay on their way into registers.
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

from tnllm_export.kernels.lightning_attention.hopper_arithmetic import (
    AT_BARRIERS,
    AT_KEYS,
    AT_VALUES,
    BV,
    EMPTY,
    FACTORED_RATE,
    FULL,
    HALF,
    LOG2_E,
    NEGLIGIBLE,
    OUT_STAGES,
    SCORE_STAGES,
    SCORED,
    STAGES,
    WALK_EMPTY,
    WALK_FULL,
    C,
    barrier,
    chunk_start,
    decay_factors,
    decayed,
    parts,
    scaled_parts,
    split,
    tokens,
    wait_for,
)


@gluon.jit
def own(  # noqa: PLR0912, PLR0915
    half,
    buffers,
    sequence,
    way,
    place,
    output,
    memory,
    K: gl.constexpr,
    REVERSE: gl.constexpr,
    HANDOVER: gl.constexpr,
    STORE_STATE: gl.constexpr,
):
    """Own half of a program's columns: bring their state to the start of the segment, then answer its queries."""
    barriers = buffers[AT_BARRIERS]
    slope, n_chunks, length = sequence
    walk_begin, walk_end, first, end, column = way
    i_segment, n_segments, segment_chunks, heads = place
    past, present, p_slots, p_ready = memory
    p_past_state, past_stride_k, past_stride_v = past
    p_present_state, present_stride_k, present_stride_v = present
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    k_index = gl.arange(0, K, layout=gl.SliceLayout(0, state_layout))
    local_v = gl.arange(0, HALF, layout=gl.SliceLayout(1, state_layout)) + half * HALF
    v_index = column + local_v
    p_past = p_past_state + k_index[None, :] * past_stride_k + v_index[:, None] * past_stride_v

    # [HALF, K], as in `sweep.py`
    if HANDOVER == "none":
        # Else the compiler takes the loop's first state for a product that is under way, and waits in each chunk.
        state = warpgroup_mma_wait(0, deps=(gl.load(p_past),))
    elif HANDOVER == "recompute":
        state = _walk(gl.load(p_past), half, buffers, sequence, 0, walk_begin, walk_end, state_layout, REVERSE)
    else:
        p_slots += local_v[:, None] * K + k_index[None, :]
        slot_stride = heads.to(gl.int64) * (K * BV)
        state = gl.zeros([HALF, K], gl.float32, state_layout)
        state = _walk(state, half, buffers, sequence, walk_begin, walk_begin, walk_end, state_layout, REVERSE)
        # Only the first segment reads it; the last one, which may write over it in place, waits for that.
        before = gl.zeros([HALF, K], gl.float32, state_layout)
        if i_segment == 0:
            before = gl.load(p_past)
        if i_segment < n_segments - 1:
            state += decayed(before, slope * tokens(i_segment, segment_chunks, n_chunks, length, REVERSE))
            gl.store(p_slots + i_segment * slot_stride, state, cache_modifier=".cg")
            # All threads' stores come before the release.
            barrier()
            gl.atomic_add(p_ready + i_segment * heads, 1, sem="release")
    # What the walk took is free.
    for stage in gl.static_range(STAGES):
        mbarrier.arrive(barriers.index(EMPTY + stage), count=1)
    if HANDOVER == "lookback":
        state = before
        i_before = i_segment
        since = i_segment * 0  # tokens from there to here
        while (i_segment < n_segments) & (i_before > 0) & (slope * since < NEGLIGIBLE):
            i_before -= 1
            wait_for(p_ready + i_before * heads, 2)  # both halves
            state += decayed(gl.load(p_slots + i_before * slot_stride, cache_modifier=".cg"), slope * since)
            since += tokens(i_before, segment_chunks, n_chunks, length, REVERSE)

    # A head that forgets within few tokens would overflow what the others count backwards.
    if slope <= FACTORED_RATE:
        state = _answer(state, half, buffers, sequence, first, end, column, output, state_layout, REVERSE, True)
    else:
        state = _answer(state, half, buffers, sequence, first, end, column, output, state_layout, REVERSE, False)

    if STORE_STATE:  # noqa: SIM102
        if i_segment == n_segments - 1:
            if HANDOVER == "lookback":  # noqa: SIM102
                if i_segment > 0:
                    # In place: a head that forgets soon has not waited for the segment that reads the past state.
                    wait_for(p_ready, 2)
            p_present = p_present_state + k_index[None, :] * present_stride_k
            gl.store(p_present + v_index[:, None] * present_stride_v, state)


@gluon.jit
def _answer(  # noqa: PLR0915
    state,
    half,
    buffers,
    sequence,
    first,
    end,
    column,
    output,
    state_layout: gl.constexpr,
    REVERSE: gl.constexpr,
    FACTORED: gl.constexpr,
):
    """Write the output of chunks `first` to `end`; return the state after them.

    Within a chunk, o_i = d_i (S q_i + Σ_j s_ij v_j / d_j), d_i being the decay from the chunk's start to token i: with
    FACTORED scores are divided by d_j, all products add up in one accumulator, and d_i comes last. Else each score is
    multiplied by its own d_i / d_j, which never overflows.
    """
    keys, queries, values, scores_high, scores_low, out, decays, barriers = buffers
    slope, n_chunks, length = sequence
    chunk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    state_operand: gl.constexpr = gl.DotOperandLayout(0, chunk_layout, 2)
    decayed_operand: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    query_row = gl.arange(0, C, layout=gl.SliceLayout(0, chunk_layout)).to(gl.float32)
    debt = slope * 0.0
    for i in range(first, end):
        n = i - first
        stage = n % STAGES
        t0 = chunk_start(i, n_chunks, REVERSE)
        count = gl.minimum(length - t0, C)
        # Computed anew for each chunk (count is always positive): registers are scarcer than exponentials.
        rate = gl.where(count > 0, -slope * LOG2_E, 0.0)
        exponent = rate * (count - 1 - query_row) if REVERSE else rate * (query_row + 1)
        k = keys.index(stage)
        q = queries.index(stage).permute((1, 0))
        v = values.index(stage * 2 + half).permute((1, 0))
        high_scores = scores_high.index(n % SCORE_STAGES)
        low_scores = scores_low.index(n % SCORE_STAGES)

        mbarrier.wait(barriers.index(FULL + stage), (n // STAGES) & 1)
        high, low = parts(state, state_operand)
        o = warpgroup_mma(high, q, gl.zeros([HALF, C], gl.float32, chunk_layout), use_acc=False, is_async=True)
        o = warpgroup_mma(low, q, o, is_async=True)
        # What rounding the decay leaves out is owed to the next chunk: else a slow head would drift.
        keep, change = decay_factors(slope * count)
        owed = change + debt
        decay = keep + owed
        debt = (keep - decay) + owed
        state = state * decay

        mbarrier.wait(barriers.index(SCORED + n % SCORE_STAGES), (n // SCORE_STAGES) & 1)
        if FACTORED:
            o = warpgroup_mma(v, high_scores, o, is_async=True)
            o = warpgroup_mma(v, low_scores, o, is_async=True)
            o, high, low = warpgroup_mma_wait(2, deps=(o, high, low))
        else:
            o, high, low = warpgroup_mma_wait(0, deps=(o, high, low))
            o = o * gl.exp2(gl.minimum(exponent, 0.0))[None, :]
            o = warpgroup_mma(v, high_scores, o, is_async=True)
            o = warpgroup_mma(v, low_scores, o, is_async=True)

        decay_high = decays.index(n % SCORE_STAGES * 2).load(gl.SliceLayout(0, decayed_operand))
        decay_low = decays.index(n % SCORE_STAGES * 2 + 1).load(gl.SliceLayout(0, decayed_operand))
        upper, lower = scaled_parts(v.load(decayed_operand), decay_high[None, :], decay_low[None, :])
        state = warpgroup_mma(upper, k, state, is_async=True)
        state = warpgroup_mma(lower, k, state, is_async=True)

        o = warpgroup_mma_wait(2, deps=(o,))
        if FACTORED:
            o = o * gl.exp2(exponent)[None, :]
        # A query beyond the last valid token is 0, and so is its output.
        answer = out.index(n % OUT_STAGES * 2 + half)
        answer.permute((1, 0)).store(o.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(output, [t0, column + half * HALF], answer)
        state, upper, lower = warpgroup_mma_wait(0, deps=(state, upper, lower))
        tma.store_wait(OUT_STAGES - 1)
        # Every warp is done with the buffers.
        barrier()
        mbarrier.arrive(barriers.index(EMPTY + stage), count=1)
    tma.store_wait(0)
    return state


@gluon.jit
def _walk(state, half, buffers, sequence, origin, begin, end, state_layout: gl.constexpr, REVERSE: gl.constexpr):
    """Return the state after chunk `end`, from that before chunk `origin`; what comes before `begin` is forgotten.

    No output: one long sum of values that decay until the end.
    """
    keys = buffers[AT_KEYS]
    values = buffers[AT_VALUES]
    barriers = buffers[AT_BARRIERS]
    slope, n_chunks, length = sequence
    operand: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    # First and last token.
    if REVERSE:
        low = (n_chunks - end) * C
        high = gl.minimum((n_chunks - origin) * C, length) - 1
    else:
        low = origin * C
        high = gl.minimum(end * C, length) - 1
    state = decayed(state, slope * gl.maximum(high + 1 - low, 0))
    rate = -slope * LOG2_E
    for i in range(begin, end):
        n = i - begin
        stage = n % STAGES
        token = chunk_start(i, n_chunks, REVERSE) + gl.arange(0, C, layout=gl.SliceLayout(0, operand))
        left = token - low + 1 if REVERSE else high - token
        decay_high, decay_low = split(gl.exp2(rate * gl.maximum(left, 0)))
        mbarrier.wait(barriers.index(WALK_FULL + stage), (n // STAGES) & 1)
        v = values.index(stage * 2 + half).permute((1, 0))
        upper, lower = scaled_parts(v.load(operand), decay_high[None, :], decay_low[None, :])
        # The operands of a product stay where they are until it is done.
        sum_ = warpgroup_mma(upper, keys.index(stage), state, is_async=True)
        sum_ = warpgroup_mma(lower, keys.index(stage), sum_, is_async=True)
        state, upper, lower = warpgroup_mma_wait(0, deps=(sum_, upper, lower))
        # Every warp is done with the buffers.
        barrier()
        mbarrier.arrive(barriers.index(WALK_EMPTY + stage), count=1)
    return state
