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
    tokens_of,
)
from tnllm_export.kernels.lightning_attention.hopper_buffers import (
    AT_ANSWER_DECAYS,
    AT_DECAYS,
    AT_EMPTY,
    AT_FULL,
    AT_ROWS,
    AT_SCORED,
    SCORE_STAGES,
    C,
    key_tile,
    query_tile,
    score_tile,
    stages_of,
)
from tnllm_export.kernels.lightning_attention.hopper_load import (
    copy_keys_and_values,
    copy_queries,
    copy_walk,
    expect_chunk,
    wait_until_free,
)


@gluon.jit
def prepare(task, reverse, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Bring the chunks of a walk, then what the owners need to answer the queries of a segment."""
    in_direction(_prepare, task, reverse, K, PARTS, REVERSE)


@gluon.jit
def score(task, reverse, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Make scores and decays of chunks that `hopper_load.load` brings."""
    in_direction(_score, task, reverse, K, PARTS, REVERSE)


@gluon.jit
def _prepare(task, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    buffers, sequence, way, tensors = task
    _, _, first, end, column = way
    STAGES: gl.constexpr = stages_of(K)
    copy_walk(tensors, buffers, sequence, way, PARTS, REVERSE)
    for n in range(gl.minimum(end - first, STAGES)):
        t0 = chunk_start(first + n, sequence, REVERSE)
        # A walk takes no queries' buffers.
        copy_queries(tensors, buffers, n, t0, PARTS)
        wait_until_free(buffers[AT_EMPTY], n, STAGES, way)
        expect_chunk(buffers, n, PARTS)
        copy_keys_and_values(tensors, buffers, n, t0, column, PARTS)
    if sequence[0] <= FACTORED_RATE:
        _prepare_chunks(task, K, PARTS, REVERSE, True)
    else:
        _prepare_chunks(task, K, PARTS, REVERSE, False)


@gluon.jit
def _prepare_chunks(task, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr, FACTORED: gl.constexpr):
    buffers, sequence, way, tensors = task
    _, _, first, end, column = way
    STAGES: gl.constexpr = stages_of(K)
    since = first * 0  # tokens that the owners' state has not decayed for
    if first < end:
        scores = _start_scores(buffers, 0, PARTS)
        since = _store_scores(scores, buffers, sequence, first, end, 0, since, REVERSE, FACTORED)
    for i in range(first + 1, end):
        n = i - first
        scores = _start_scores(buffers, n, PARTS)
        if n > 1:
            # The chunk before the last is answered: a further one comes where it was.
            further = n + STAGES - 2
            stage = further % STAGES
            wait_until_free(buffers[AT_EMPTY], further, STAGES, way)
            wanted = first + further < end
            t0 = chunk_start(first + further, sequence, REVERSE)
            expect_chunk(buffers, stage, PARTS, wanted)
            copy_queries(tensors, buffers, stage, t0, PARTS, wanted)
            copy_keys_and_values(tensors, buffers, stage, t0, column, PARTS, wanted)
        since = _store_scores(scores, buffers, sequence, i, end, n, since, REVERSE, FACTORED)


@gluon.jit
def _score(task, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    if task[1][0] <= FACTORED_RATE:
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
    slope = sequence[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    key_row = gl.arange(0, C, layout=gl.SliceLayout(1, layout)).to(gl.float32)
    query_row = gl.arange(0, C, layout=gl.SliceLayout(0, layout)).to(gl.float32)
    row = gl.arange(0, C, layout=gl.BlockedLayout([1], [32], [4], [0])).to(gl.float32)
    count = tokens_of(chunk_start(i, sequence, REVERSE))
    rate = gl.where(count > 0, -slope * LOG2_E, 0.0)
    # [C, C]: rows are keys, columns queries. Exponents of d. Tokens before the first valid one are 0.
    if REVERSE:
        seen = key_row[:, None] >= query_row[None, :]
        key_exponent = rate * (since + C - 1 - key_row)
        query_exponent = rate * (C - 1 - query_row)
        exponent = rate * (since + C - 1 - row)
    else:
        seen = query_row[None, :] >= key_row[:, None]
        key_exponent = rate * (since + count - C + 1 + key_row)
        query_exponent = rate * (count - C + 1 + query_row)
        exponent = rate * (since + count - C + 1 + row)
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
