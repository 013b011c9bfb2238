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
    FACTORED_RATE,
    LOG2_E,
    NEGLIGIBLE,
    barrier,
    chunk_start,
    decay_factors,
    decayed,
    decays_now,
    progression,
    scaled_parts,
    split,
    tokens_before,
    tokens_of,
    upper_half,
    upper_part,
    wait_for,
)
from tnllm_export.kernels.lightning_attention.hopper_buffers import (
    AT_ANSWER_DECAYS,
    AT_ASKED,
    AT_DECAYS,
    AT_EMPTY,
    AT_EXCHANGED,
    AT_FULL,
    AT_OUT,
    AT_PARTIAL,
    AT_SCORED,
    AT_WALK_EMPTY,
    AT_WALK_FULL,
    HALF,
    OUT_STAGES,
    SCORE_STAGES,
    C,
    halves_of,
    key_tile,
    query_tile,
    score_tile,
    stages_of,
    value_tile,
    walk_stages_of,
)
from tnllm_export.kernels.lightning_attention.hopper_store import copy_out, copy_zeros


@gluon.jit
def own(
    owner,
    task,
    reverse,
    K: gl.constexpr,
    PARTS: gl.constexpr,
    REVERSE: gl.constexpr,
    HANDOVER: gl.constexpr,
    STORE_STATE: gl.constexpr,
):
    """Own half of a program's state: bring it to the start of the segment, then answer its queries.

    Half of the columns; where a state has two PARTS, half of the rows. `reverse` counts where REVERSE is None: what
    runs is compiled for one direction all the same.
    """
    if REVERSE is None:
        if reverse:
            _own(owner, task, K, PARTS, True, HANDOVER, STORE_STATE)
        else:
            _own(owner, task, K, PARTS, False, HANDOVER, STORE_STATE)
    else:
        _own(owner, task, K, PARTS, REVERSE, HANDOVER, STORE_STATE)


@gluon.jit
def _own(  # noqa: PLR0912, PLR0915
    owner,
    task,
    K: gl.constexpr,
    PARTS: gl.constexpr,
    REVERSE: gl.constexpr,
    HANDOVER: gl.constexpr,
    STORE_STATE: gl.constexpr,
):
    buffers, sequence, way, place, output, memory = task
    STAGES: gl.constexpr = stages_of(K)
    KP: gl.constexpr = K // PARTS
    BV: gl.constexpr = halves_of(PARTS) * HALF
    half = owner if PARTS == 1 else 0
    part = 0 if PARTS == 1 else owner
    slope, _, length = sequence
    walk_begin, walk_end, first, end, column = way
    i_segment, n_segments, segment_chunks, segments, heads, T = place
    past, present, stores_state, p_slots, p_ready = memory
    p_past_state, past_stride_k, past_stride_v = past
    p_present_state, present_stride_k, present_stride_v = present
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KP, 16])
    k_index = gl.arange(0, KP, layout=gl.SliceLayout(0, state_layout)) + part * KP
    local_v = gl.arange(0, HALF, layout=gl.SliceLayout(1, state_layout)) + half * HALF
    v_index = column + local_v
    p_past = p_past_state + k_index[None, :] * past_stride_k + v_index[:, None] * past_stride_v

    walks = walk_begin < walk_end

    # Padding: this owner's share of the tokens behind the last valid one, in chunks.
    padding = (T - length + C - 1) // C
    padding_from = padding * i_segment // segments
    padding_to = padding * (i_segment + 1) // segments
    if padding_from + part < padding_to:
        nothing = buffers[AT_OUT].index(owner)
        nothing.store(gl.full([C, HALF], 0.0, gl.bfloat16, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
        fence_async_shared()
        barrier()
        for i in range(padding_from + part, padding_to, PARTS):
            copy_zeros(buffers[AT_OUT], owner, output, length + i * C, column + half * HALF)
        tma.store_wait(0)
        barrier()

    # [HALF, KP], as in `sweep.py`
    if HANDOVER == "none":
        # Else the compiler takes the loop's first state for a product that is under way, and waits in each chunk.
        state = warpgroup_mma_wait(0, deps=(gl.load(p_past),))
    elif HANDOVER == "recompute":
        state = _walk(
            gl.load(p_past), half, part, buffers, sequence, 0, walk_begin, walk_end, state_layout, PARTS, REVERSE
        )
    else:
        p_slots += owner * (HALF * KP)
        slot_stride = heads.to(gl.int64) * (K * BV)
        state = gl.zeros([HALF, KP], gl.float32, state_layout)
        state = _walk(
            state, half, part, buffers, sequence, walk_begin, walk_begin, walk_end, state_layout, PARTS, REVERSE
        )
        # Only the first segment reads it; the last one, which may write over it in place, waits for that.
        before = gl.zeros([HALF, KP], gl.float32, state_layout)
        if i_segment == 0:
            before = gl.load(p_past)
        if i_segment < n_segments - 1:
            state += decayed(before, slope * _segment_tokens(i_segment, segment_chunks, sequence, REVERSE))
            _store_slot(p_slots + i_segment * slot_stride, state)
            # All threads' stores come before the release.
            barrier()
            gl.atomic_add(p_ready + i_segment * heads, 1, sem="release")
    if walks:
        # What the walk took is free. Not earlier: copies would be in the way of what others wait for.
        for stage in gl.static_range(STAGES):
            _release_queries(buffers, stage, STAGES)
            mbarrier.arrive(buffers[AT_EMPTY].index(stage), count=1)
    if HANDOVER == "lookback":
        state = before
        i_before = i_segment
        since = i_segment * 0  # tokens from there to here
        while (i_segment < n_segments) & (i_before > 0) & (slope * since < NEGLIGIBLE):
            i_before -= 1
            wait_for(p_ready + i_before * heads, 2)  # both owners
            state += decayed(_load_slot(p_slots + i_before * slot_stride, KP, state_layout), slope * since)
            since += _segment_tokens(i_before, segment_chunks, sequence, REVERSE)

    # A head that forgets within few tokens would overflow what the others count backwards.
    if slope <= FACTORED_RATE:
        state = _answer(
            state, half, part, buffers, sequence, first, end, column, output, state_layout, PARTS, REVERSE, True
        )
    else:
        state = _answer(
            state, half, part, buffers, sequence, first, end, column, output, state_layout, PARTS, REVERSE, False
        )

    if STORE_STATE:  # noqa: SIM102
        if stores_state & (i_segment == n_segments - 1):
            if HANDOVER == "lookback":  # noqa: SIM102
                if i_segment > 0:
                    # In place: a head that forgets soon has not waited for the segment that reads the past state.
                    wait_for(p_ready, 2)
            p_present = p_present_state + k_index[None, :] * present_stride_k
            gl.store(p_present + v_index[:, None] * present_stride_v, state)


@gluon.jit
def _answer(  # noqa: PLR0912, PLR0915
    state,
    half,
    part,
    buffers,
    sequence,
    first,
    end,
    column,
    output,
    state_layout: gl.constexpr,
    PARTS: gl.constexpr,
    REVERSE: gl.constexpr,
    FACTORED: gl.constexpr,
):
    """Write the output of chunks `first` to `end`; return the state after them.

    Within a chunk, o_i = d_i (S q_i + Σ_j s_ij v_j / d_j), d_i being the decay from the chunk's start to token i: with
    FACTORED scores are divided by d_j, all products add up in one accumulator, and d_i comes last. So it may as well be
    the decay from an earlier chunk's start, and the state decay at some chunks only, by all that it has missed.
    Else each score is multiplied by its own d_i / d_j, which never overflows, and the state decays at each chunk.
    """
    out = buffers[AT_OUT]
    partial = buffers[AT_PARTIAL]
    decays = buffers[AT_DECAYS]
    answer_decays = buffers[AT_ANSWER_DECAYS]
    slope = sequence[0]
    STAGES: gl.constexpr = stages_of(state.shape[1] * PARTS)
    chunk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    chunk_operand: gl.constexpr = gl.DotOperandLayout(0, chunk_layout, 2)
    decayed_operand: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    since = first * 0  # tokens that the state has not decayed for
    for i in range(first, end):
        n = i - first
        stage = n % STAGES
        t0 = chunk_start(i, sequence, REVERSE)
        count = tokens_of(t0)
        k = key_tile(buffers, stage, part, PARTS)
        q = query_tile(buffers, stage, part, PARTS).permute((1, 0))
        v = value_tile(buffers, stage, half, PARTS).permute((1, 0))
        # Two owners of the same columns take one part of the scores each.
        first_scores = score_tile(buffers, n, part)
        second_scores = score_tile(buffers, n, 1)

        mbarrier.wait(buffers[AT_FULL].index(stage), (n // STAGES) & 1)
        # The second part is made while the first one's product runs.
        high = gl.convert_layout(upper_half(state), chunk_operand)
        o = warpgroup_mma(high, q, gl.zeros([HALF, C], gl.float32, chunk_layout), use_acc=False, is_async=True)
        low = gl.convert_layout((state - upper_part(state)).to(gl.bfloat16), chunk_operand)
        o = warpgroup_mma(low, q, o, is_async=True)

        mbarrier.wait(buffers[AT_SCORED].index(n % SCORE_STAGES), (n // SCORE_STAGES) & 1)
        if not FACTORED:
            o, high, low = warpgroup_mma_wait(0, deps=(o, high, low))
            _release_queries(buffers, stage, STAGES)
            # Computed anew for each chunk (count is always positive): registers are scarcer than exponentials.
            rate = gl.where(count > 0, -slope * LOG2_E, 0.0)
            if REVERSE:
                exponent = progression(rate * (C - 1), -rate, chunk_layout)
            else:
                exponent = progression(rate * (count - C + 1), rate, chunk_layout)
            o = o * gl.exp2(gl.minimum(exponent, 0.0))[None, :]
        rows = v.load(decayed_operand)
        values = gl.convert_layout(rows, chunk_operand)
        o = warpgroup_mma(values, first_scores, o, is_async=True)
        if PARTS == 1:
            o = warpgroup_mma(values, second_scores, o, is_async=True)
        since += count
        if FACTORED:
            if decays_now(slope, since, i == end - 1):
                state = _scaled(state, slope * since)
                since = since * 0
        else:
            state = _scaled(state, slope * since)
            since = since * 0
        decay_high = decays.index(n % SCORE_STAGES * 2).load(gl.SliceLayout(0, decayed_operand))
        decay_low = decays.index(n % SCORE_STAGES * 2 + 1).load(gl.SliceLayout(0, decayed_operand))
        if FACTORED:
            o, high, low = warpgroup_mma_wait(3 - PARTS, deps=(o, high, low))
            _release_queries(buffers, stage, STAGES)
        upper, lower = scaled_parts(rows, decay_high[None, :], decay_low[None, :])
        state = warpgroup_mma(upper, k, state, is_async=True)
        state = warpgroup_mma(lower, k, state, is_async=True)

        answer_decay = answer_decays.index(n % SCORE_STAGES).load(gl.SliceLayout(0, chunk_layout))
        o = warpgroup_mma_wait(2, deps=(o,))
        if PARTS == 1:
            if FACTORED:
                o = o * answer_decay[None, :]
            _write(o, out, n % OUT_STAGES * 2 + half, output, t0, column + half * HALF)
        elif n % 2 == part:
            # They finish chunks by turns. What is read here is written again by the same threads.
            mbarrier.wait(buffers[AT_EXCHANGED].index(0), n & 1)
            o += partial.load(chunk_layout)
            if FACTORED:
                o = o * answer_decay[None, :]
            _write(o, out, n % OUT_STAGES, output, t0, column)
        else:
            partial.store(o)
            tma.store_wait(0)  # its buffer is free for the next chunk
            barrier()
            mbarrier.arrive(buffers[AT_EXCHANGED].index(0), count=1)
        state, upper, lower = warpgroup_mma_wait(0, deps=(state, upper, lower))
        tma.store_wait(OUT_STAGES - 1)
        # Every warp is done with the buffers.
        barrier()
        mbarrier.arrive(buffers[AT_EMPTY].index(stage), count=1)
    tma.store_wait(0)
    return state


@gluon.jit
def _segment_tokens(i_segment, segment_chunks, sequence, REVERSE: gl.constexpr):
    """Valid tokens of a segment that is not the last one."""
    start = i_segment * segment_chunks
    return tokens_before(start + segment_chunks, sequence, REVERSE) - tokens_before(start, sequence, REVERSE)


@gluon.jit
def _release_queries(buffers, stage, STAGES: gl.constexpr):
    """Let further queries come into this stage before the rest of its chunk has been used (`hopper_load.load`)."""
    if STAGES == 2:
        barrier()
        mbarrier.arrive(buffers[AT_ASKED].index(stage), count=1)


@gluon.jit
def _scaled(state, rate):
    """exp(-rate) state, rounded once."""
    keep, change = decay_factors(rate)
    return state * (keep + change)


@gluon.jit
def _write(o, answers, i, output, t0, column):
    """Start to copy a chunk's output [HALF, C] to its place, through the i-th of the buffers, which is free."""
    answers.index(i).permute((1, 0)).store(o.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    copy_out(answers, i, output, t0, column)


# A state goes to another segment laid out as its registers are: 16 bytes of each thread in a row.
@gluon.jit
def _store_slot(p_slot, state):
    KP: gl.constexpr = state.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([KP // 8, 4], [1, 32], [4, 1], [1, 0])
    tiles = state.reshape([4, 2, 8, KP // 8, 4, 2]).permute((0, 3, 2, 4, 1, 5)).reshape([KP // 2, 128])
    tiles = gl.convert_layout(tiles, layout, assert_trivial=True)
    gl.store(_slot_places(p_slot, KP, layout), tiles, cache_modifier=".cg")


@gluon.jit
def _load_slot(p_slot, KP: gl.constexpr, state_layout: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([KP // 8, 4], [1, 32], [4, 1], [1, 0])
    tiles = gl.load(_slot_places(p_slot, KP, layout), cache_modifier=".cg").reshape([4, KP // 8, 8, 4, 2, 2])
    state = tiles.permute((0, 4, 2, 1, 3, 5)).reshape([HALF, KP])
    return gl.convert_layout(state, state_layout, assert_trivial=True)


@gluon.jit
def _slot_places(p_slot, KP: gl.constexpr, layout: gl.constexpr):
    row = gl.arange(0, KP // 2, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    return p_slot + row[:, None] * 128 + column[None, :]


@gluon.jit
def _walk(
    state,
    half,
    part,
    buffers,
    sequence,
    origin,
    begin,
    end,
    state_layout: gl.constexpr,
    PARTS: gl.constexpr,
    REVERSE: gl.constexpr,
):
    """Return the state after chunk `end`, from that before chunk `origin`; what comes before `begin` is forgotten.

    No output: one long sum of values that decay until the end, in any order; see `hopper_load.copy_walk` for this one.
    """
    slope, _, length = sequence
    STAGES: gl.constexpr = walk_stages_of(state.shape[1] * PARTS)
    operand: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    before = tokens_before(origin, sequence, REVERSE)
    until = tokens_before(end, sequence, REVERSE)
    state = decayed(state, slope * gl.maximum(until - before, 0))
    rate = -slope * LOG2_E
    for n in range(end - begin):
        i = end - 1 - n
        stage = n % STAGES
        t0 = chunk_start(i, sequence, REVERSE)
        if REVERSE:
            # Nothing stands before token 0, where the exponent would be positive.
            exponent = gl.minimum(progression(rate * (t0 + 1 - (length - until)), rate, operand), 0.0)
        else:
            exponent = progression(rate * (until - 1 - t0), -rate, operand)
        decay_high, decay_low = split(gl.exp2(exponent))
        mbarrier.wait(buffers[AT_WALK_FULL].index(stage), (n // STAGES) & 1)
        k = key_tile(buffers, stage, part, PARTS)
        v = value_tile(buffers, stage, half, PARTS).permute((1, 0))
        upper, lower = scaled_parts(v.load(operand), decay_high[None, :], decay_low[None, :])
        # The operands of a product stay where they are until it is done.
        sum_ = warpgroup_mma(upper, k, state, is_async=True)
        sum_ = warpgroup_mma(lower, k, sum_, is_async=True)
        state, upper, lower = warpgroup_mma_wait(0, deps=(sum_, upper, lower))
        # Every warp is done with the buffers.
        barrier()
        mbarrier.arrive(buffers[AT_WALK_EMPTY].index(stage), count=1)
    return state
