"""The group of warps that prepares for the owners of the state in `sweep_hopper.py`.

It starts all copies, so it is the one that waits for free buffers, and makes scores and decays up to two chunks ahead.
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
    AT_ANSWER_DECAYS,
    AT_DECAYS,
    AT_EMPTY,
    AT_FULL,
    AT_KEYS,
    AT_QUERIES,
    AT_SCORED,
    AT_SCORES,
    AT_VALUES,
    AT_WALK_EMPTY,
    AT_WALK_FULL,
    FACTORED_RATE,
    HALF,
    LOG2_E,
    SCORE_STAGES,
    C,
    barrier,
    chunk_start,
    decays_now,
    halves_of,
    split,
)

# With 256 keys two chunks have buffers, which a copy from DRAM is too slow to fill in time: so many chunks ahead of its
# copy one is brought into L2.
WALK_AHEAD = gl.constexpr(2)
ANSWER_AHEAD = gl.constexpr(1)


@gluon.jit
def prepare(task, reverse, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Bring the chunks of a walk, then what the owners need to answer the queries of a segment.

    `reverse` counts where REVERSE is None.
    """
    if REVERSE is None:
        if reverse:
            _prepare(task, K, V, PARTS, True)
        else:
            _prepare(task, K, V, PARTS, False)
    else:
        _prepare(task, K, V, PARTS, REVERSE)


@gluon.jit
def _prepare(task, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    buffers, sequence, way, query, key, value = task
    keys = buffers[AT_KEYS]
    values = buffers[AT_VALUES]
    slope, n_chunks, length = sequence
    walk_begin, walk_end, first, end, column = way
    STAGES: gl.constexpr = keys.shape[0] // PARTS
    HALVES: gl.constexpr = halves_of(PARTS)
    KP: gl.constexpr = keys.shape[2]
    valid = gl.maximum(length, 1)
    memory = (query, key, value, valid)
    # A map takes most of a microsecond. Meanwhile the first chunk comes into L2, and maps that a walk needs go first.
    if STAGES > 2:
        start = chunk_start(gl.where(walk_begin < walk_end, walk_end - 1, first), n_chunks, REVERSE)
        _prefetch(key, start, valid, 0, K)
        _prefetch(value, start, valid, column, HALVES * HALF)
        _prefetch(query, chunk_start(first, n_chunks, REVERSE), valid, 0, K)
    key = tma.make_tensor_descriptor(key[0], [valid, K], [key[1], 1], [C, KP], keys.layout)
    value = tma.make_tensor_descriptor(value[0], [valid, V], [value[1], 1], [C, HALF], values.layout)
    # From the last chunk to the first, which the answer then finds in L2.
    for n in range(walk_end - walk_begin):
        i = walk_end - 1 - n
        stage = n % STAGES
        mbarrier.wait(buffers[AT_WALK_EMPTY].index(stage), ((n // STAGES) & 1) ^ 1)
        t0 = chunk_start(i, n_chunks, REVERSE)
        if STAGES == 2:
            ahead = chunk_start(gl.maximum(i - WALK_AHEAD, walk_begin), n_chunks, REVERSE)
            _prefetch(memory[1], ahead, valid, 0, K)
            _prefetch(memory[2], ahead, valid, column, HALVES * HALF)
        full = buffers[AT_WALK_FULL].index(stage)
        mbarrier.expect(full, key.block_type.nbytes * PARTS + value.block_type.nbytes * HALVES)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(key, [t0, part * KP], full, keys.index(stage * PARTS + part))
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(
                value, [t0, column + half * HALF], full, values.index(stage * HALVES + half)
            )
    query = tma.make_tensor_descriptor(query[0], [valid, K], [query[1], 1], [C, KP], keys.layout)
    maps = (query, key, value)
    tensors = maps + memory if STAGES == 2 else maps
    for stage in gl.static_range(STAGES):
        mbarrier.wait(buffers[AT_EMPTY].index(stage), 0)
        _load(tensors, buffers, first + stage, stage, end, column, n_chunks, PARTS, REVERSE)
    if slope <= FACTORED_RATE:
        _prepare_chunks(tensors, buffers, sequence, first, end, column, PARTS, REVERSE, True)
    else:
        _prepare_chunks(tensors, buffers, sequence, first, end, column, PARTS, REVERSE, False)


@gluon.jit
def _prepare_chunks(
    tensors,
    buffers,
    sequence,
    first,
    end,
    column,
    PARTS: gl.constexpr,
    REVERSE: gl.constexpr,
    FACTORED: gl.constexpr,
):
    n_chunks = sequence[1]
    STAGES: gl.constexpr = buffers[AT_KEYS].shape[0] // PARTS
    since = first * 0  # tokens that the owners' state has not decayed for
    if first < end:
        scores = _start_scores(buffers, 0, PARTS)
        since = _store_scores(scores, buffers, sequence, first, end, 0, since, REVERSE, FACTORED)
    for i in range(first + 1, end):
        n = i - first
        if STAGES > 2:
            scores = _start_scores(buffers, n, PARTS)
            if n > 1:
                _load_next(tensors, buffers, i, n, end, column, n_chunks, PARTS, REVERSE)
        else:
            # Two chunks have buffers: this one comes where the chunk before the last was.
            if n > 1:
                _load_next(tensors, buffers, i, n, end, column, n_chunks, PARTS, REVERSE)
            scores = _start_scores(buffers, n, PARTS)
        since = _store_scores(scores, buffers, sequence, i, end, n, since, REVERSE, FACTORED)


@gluon.jit
def _load_next(tensors, buffers, i, n, end, column, n_chunks, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Wait until the chunk before the last is answered, and start to copy a further one into its buffers."""
    STAGES: gl.constexpr = buffers[AT_KEYS].shape[0] // PARTS
    free = (n - 2) % STAGES
    mbarrier.wait(buffers[AT_EMPTY].index(free), ((n - 2) // STAGES + 1) & 1)
    _load(tensors, buffers, i + STAGES - 2, free, end, column, n_chunks, PARTS, REVERSE)


@gluon.jit
def _start_scores(buffers, n, PARTS: gl.constexpr):
    """Wait for the n-th chunk and start the product of its keys and queries, [C, C]."""
    keys = buffers[AT_KEYS]
    queries = buffers[AT_QUERIES]
    STAGES: gl.constexpr = keys.shape[0] // PARTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    stage = n % STAGES
    mbarrier.wait(buffers[AT_FULL].index(stage), (n // STAGES) & 1)
    empty = gl.zeros([C, C], gl.float32, layout)
    q = queries.index(stage * PARTS).permute((1, 0))
    scores = warpgroup_mma(keys.index(stage * PARTS), q, empty, use_acc=False, is_async=True)
    if PARTS == 2:
        q = queries.index(stage * PARTS + 1).permute((1, 0))
        scores = warpgroup_mma(keys.index(stage * PARTS + 1), q, scores, is_async=True)
    return scores


@gluon.jit
def _store_scores(scores, buffers, sequence, i, end, n, since, REVERSE: gl.constexpr, FACTORED: gl.constexpr):
    """Wait for the scores of chunk i, the n-th here; publish them scaled and masked, and decays.

    Args:
        since: Tokens that the state before the chunk has not decayed for.

    Returns:
        The same for the state after it.
    """
    parts = buffers[AT_SCORES]
    decays = buffers[AT_DECAYS]
    slope, n_chunks, length = sequence
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    key_row = gl.arange(0, C, layout=gl.SliceLayout(1, layout)).to(gl.float32)
    query_row = gl.arange(0, C, layout=gl.SliceLayout(0, layout)).to(gl.float32)
    row = gl.arange(0, C, layout=gl.BlockedLayout([1], [32], [4], [0])).to(gl.float32)
    count = gl.minimum(length - chunk_start(i, n_chunks, REVERSE), C)
    rate = gl.where(count > 0, -slope * LOG2_E, 0.0)
    # [C, C]: rows are keys, columns queries. Exponents of d.
    if REVERSE:
        seen = key_row[:, None] >= query_row[None, :]
        key_exponent = rate * (since + count - 1 - key_row)
        query_exponent = rate * (count - 1 - query_row)
        exponent = rate * (since + count - 1 - row)
    else:
        seen = query_row[None, :] >= key_row[:, None]
        key_exponent = rate * (since + 1 + key_row)
        query_exponent = rate * (query_row + 1)
        exponent = rate * (since + 1 + row)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    stage = n % SCORE_STAGES
    if FACTORED:
        scores = gl.where(seen, scores * gl.exp2(-key_exponent)[:, None], 0.0)
        buffers[AT_ANSWER_DECAYS].index(stage).store(gl.exp2(exponent))
    else:
        scores = scores * gl.where(seen, gl.exp2(query_exponent[None, :] - key_exponent[:, None]), 0.0)
    high, low = split(scores)
    parts.index(stage * 2).store(high)
    parts.index(stage * 2 + 1).store(low)
    # Values decay until the chunk's end, or have what the state has not decayed in advance.
    since += count
    until_end = gl.minimum(rate * since - exponent, 0.0)
    if FACTORED:
        now = decays_now(slope, since, i == end - 1)
        exponent = gl.where(now, until_end, -exponent)
        since = gl.where(now, 0, since)
    else:
        exponent = until_end
        since = since * 0
    high, low = split(gl.exp2(exponent))
    decays.index(stage * 2).store(high)
    decays.index(stage * 2 + 1).store(low)
    fence_async_shared()
    barrier()
    mbarrier.arrive(buffers[AT_SCORED].index(stage), count=1)
    return since


@gluon.jit
def _load(tensors, buffers, i, stage, end, column, n_chunks, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Start to copy chunk i, if there is one, into the buffers of a stage."""
    query, key, value = tensors[:3]
    keys = buffers[AT_KEYS]
    queries = buffers[AT_QUERIES]
    values = buffers[AT_VALUES]
    HALVES: gl.constexpr = halves_of(PARTS)
    KP: gl.constexpr = keys.shape[2]
    wanted = i < end
    t0 = chunk_start(i, n_chunks, REVERSE)
    full = buffers[AT_FULL].index(stage)
    nbytes: gl.constexpr = key.block_type.nbytes * 2 * PARTS + value.block_type.nbytes * HALVES
    mbarrier.expect(full, nbytes, pred=wanted)
    for part in gl.static_range(PARTS):
        place = [t0, part * KP]
        tma.async_copy_global_to_shared(key, place, full, keys.index(stage * PARTS + part), pred=wanted)
        tma.async_copy_global_to_shared(query, place, full, queries.index(stage * PARTS + part), pred=wanted)
    for half in gl.static_range(HALVES):
        place = [t0, column + half * HALF]
        tma.async_copy_global_to_shared(value, place, full, values.index(stage * HALVES + half), pred=wanted)
    if keys.shape[0] // PARTS == 2:
        _, _, _, query, key, value, valid = tensors
        ahead = chunk_start(gl.minimum(i + ANSWER_AHEAD, end - 1), n_chunks, REVERSE)
        _prefetch(query, ahead, valid, 0, PARTS * KP)
        _prefetch(key, ahead, valid, 0, PARTS * KP)
        _prefetch(value, ahead, valid, column, HALVES * HALF)


@gluon.jit
def _prefetch(memory, t0, valid, column, COLUMNS: gl.constexpr):
    """Bring the 64 tokens from t0 on, as far as there are any, into L2. `memory`: address, and stride of tokens."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 * HALF // COLUMNS, COLUMNS // HALF], [4, 1], [1, 0])
    row = gl.maximum(gl.minimum(t0 + gl.arange(0, C, layout=gl.SliceLayout(1, layout)), valid - 1), 0)
    line = column + gl.arange(0, COLUMNS // HALF, layout=gl.SliceLayout(0, layout)) * HALF
    places = memory[0] + (row.to(gl.int64) * memory[1])[:, None] + line[None, :]
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=gl.int32, is_pure=False, pack=1
    )
