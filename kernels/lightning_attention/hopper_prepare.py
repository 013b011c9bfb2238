"""The group of warps that prepares for the owners of the state in `sweep_hopper.py`.

It makes scores and decays up to two chunks ahead. But for 256 keys it starts all copies, too, so it is the one that
waits for free buffers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tnllm_export.kernels.lightning_attention.hopper_arithmetic import (
    FACTORED_RATE,
    LOG2_E,
    barrier,
    chunk_start,
    decays_now,
    in_direction,
    split,
)
from tnllm_export.kernels.lightning_attention.hopper_buffers import (
    AT_ANSWER_DECAYS,
    AT_DECAYS,
    AT_EMPTY,
    AT_FULL,
    AT_ROWS,
    AT_SCORED,
    HALF,
    SCORE_STAGES,
    C,
    halves_of,
    key_tile,
    query_tile,
    score_tile,
    stages_of,
)
from tnllm_export.kernels.lightning_attention.hopper_load import (
    copy_chunk,
    copy_walk,
    key_map,
    prefetch,
    value_map,
)


@gluon.jit
def prepare(task, reverse, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Bring the chunks of a walk, then what the owners need to answer the queries of a segment."""
    in_direction(_prepare, task, reverse, K, V, PARTS, REVERSE)


@gluon.jit
def score(task, reverse, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Make scores and decays of chunks that `hopper_load.load` brings."""
    in_direction(_score, task, reverse, K, V, PARTS, REVERSE)


@gluon.jit
def _prepare(task, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    buffers, sequence, way, query, key, value = task
    slope, n_chunks, length = sequence
    walk_begin, walk_end, first, end, column = way
    # A map takes most of a microsecond. Meanwhile the first chunk comes into L2, and maps that a walk needs go first.
    start = chunk_start(gl.where(walk_begin < walk_end, walk_end - 1, first), n_chunks, REVERSE)
    prefetch(key, start, length, 0, K)
    prefetch(value, start, length, column, halves_of(PARTS) * HALF)
    prefetch(query, chunk_start(first, n_chunks, REVERSE), length, 0, K)
    key = key_map(key, buffers, length, K)
    value = value_map(value, buffers, length, V)
    copy_walk(key, value, buffers, n_chunks, walk_begin, walk_end, column, PARTS, REVERSE)
    query = key_map(query, buffers, length, K)
    maps = (query, key, value)
    STAGES: gl.constexpr = stages_of(K)
    for stage in gl.static_range(STAGES):
        mbarrier.wait(buffers[AT_EMPTY].index(stage), 0)
        i = first + stage
        copy_chunk(maps, buffers, stage, chunk_start(i, n_chunks, REVERSE), column, PARTS, i < end)
    if slope <= FACTORED_RATE:
        _prepare_chunks(maps, buffers, sequence, first, end, column, PARTS, REVERSE, True)
    else:
        _prepare_chunks(maps, buffers, sequence, first, end, column, PARTS, REVERSE, False)


@gluon.jit
def _prepare_chunks(
    maps, buffers, sequence, first, end, column, PARTS: gl.constexpr, REVERSE: gl.constexpr, FACTORED: gl.constexpr
):
    n_chunks = sequence[1]
    STAGES: gl.constexpr = stages_of(buffers[AT_ROWS].shape[2] * PARTS)
    since = first * 0  # tokens that the owners' state has not decayed for
    if first < end:
        scores = _start_scores(buffers, 0, PARTS)
        since = _store_scores(scores, buffers, sequence, first, end, 0, since, REVERSE, FACTORED)
    for i in range(first + 1, end):
        n = i - first
        scores = _start_scores(buffers, n, PARTS)
        if n > 1:
            # The chunk before the last is answered: a further one comes where it was.
            free = (n - 2) % STAGES
            mbarrier.wait(buffers[AT_EMPTY].index(free), ((n - 2) // STAGES + 1) & 1)
            t0 = chunk_start(i + STAGES - 2, n_chunks, REVERSE)
            copy_chunk(maps, buffers, free, t0, column, PARTS, i + STAGES - 2 < end)
        since = _store_scores(scores, buffers, sequence, i, end, n, since, REVERSE, FACTORED)


@gluon.jit
def _score(task, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    _, sequence, _ = task
    if sequence[0] <= FACTORED_RATE:
        _score_chunks(task, PARTS, REVERSE, True)
    else:
        _score_chunks(task, PARTS, REVERSE, False)


@gluon.jit
def _score_chunks(task, PARTS: gl.constexpr, REVERSE: gl.constexpr, FACTORED: gl.constexpr):
    buffers, sequence, way = task
    _, _, first, end, _ = way
    since = first * 0  # tokens that the owners' state has not decayed for
    for i in range(first, end):
        scores = _start_scores(buffers, i - first, PARTS)
        since = _store_scores(scores, buffers, sequence, i, end, i - first, since, REVERSE, FACTORED)


@gluon.jit
def _start_scores(buffers, n, PARTS: gl.constexpr):
    """Wait for the n-th chunk and start the product of its keys and queries, [C, C]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    STAGES: gl.constexpr = stages_of(buffers[AT_ROWS].shape[2] * PARTS)
    stage = n % STAGES
    mbarrier.wait(buffers[AT_FULL].index(stage), (n // STAGES) & 1)
    empty = gl.zeros([C, C], gl.float32, layout)
    q = query_tile(buffers, stage, 0, PARTS).permute((1, 0))
    scores = warpgroup_mma(key_tile(buffers, stage, 0, PARTS), q, empty, use_acc=False, is_async=True)
    if PARTS == 2:
        q = query_tile(buffers, stage, 1, PARTS).permute((1, 0))
        scores = warpgroup_mma(key_tile(buffers, stage, 1, PARTS), q, scores, is_async=True)
    return scores


@gluon.jit
def _store_scores(scores, buffers, sequence, i, end, n, since, REVERSE: gl.constexpr, FACTORED: gl.constexpr):
    """Wait for the scores of chunk i, the n-th here; publish them scaled and masked, and decays.

    Args:
        since: Tokens that the state before the chunk has not decayed for.

    Returns:
        The same for the state after it.
    """
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
    score_tile(buffers, n, 0).store(high)
    score_tile(buffers, n, 1).store(low)
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
