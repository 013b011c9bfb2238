"""Copies into shared memory for `sweep_hopper.py`: who starts them, and what they wait for.

Where three chunks have buffers, the group that makes scores starts the copies, too (`hopper_prepare.py`). With 256 keys
there is room for two, and whoever makes scores is too busy to refill one in time: a warp of its own does nothing else.

The tensor maps of queries, keys and values, [B, T, H, D], come with the launch (`hopper_launch.py`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tnllm_export.kernels.lightning_attention.hopper_arithmetic import chunk_start, in_direction
from tnllm_export.kernels.lightning_attention.hopper_buffers import (
    AT_ASKED,
    AT_EMPTY,
    AT_FULL,
    AT_ROWS,
    AT_TILES,
    AT_WALK_EMPTY,
    AT_WALK_FULL,
    HALF,
    C,
    async_load,
    block_of,
    halves_of,
    key_place,
    query_place,
    stages_of,
    value_place,
    walk_stages_of,
)


@gluon.jit
def load(task, reverse, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Bring the chunks of a walk, then those of a segment, each as soon as its buffers are free."""
    in_direction(_load, task, reverse, K, PARTS, REVERSE)


@gluon.jit
def _load(task, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    buffers, sequence, way, tensors = task
    first, end = way[2], way[3]
    copy_walk(tensors, buffers, sequence, way, PARTS, REVERSE)
    STAGES: gl.constexpr = stages_of(K)
    for i in range(first, end):
        n = i - first
        stage = n % STAGES
        t0 = chunk_start(i, sequence, REVERSE)
        # The owners are done with queries before they are with the rest of a chunk.
        wait_until_free(buffers[AT_ASKED], n, STAGES, way)
        expect_chunk(buffers, stage, PARTS)
        copy_queries(tensors, buffers, stage, t0, PARTS)
        wait_until_free(buffers[AT_EMPTY], n, STAGES, way)
        copy_keys_and_values(tensors, buffers, stage, t0, way[4], PARTS)


@gluon.jit
def wait_until_free(free, n, STAGES: gl.constexpr, way):
    """Wait until the n-th chunk of a segment has its buffers."""
    # If there is no walk, the first ones have theirs from the start.
    walks = gl.where(way[0] < way[1], 1, 0)
    mbarrier.wait(free.index(n % STAGES), (n // STAGES + 1 + walks) & 1)


@gluon.jit
def copy_walk(tensors, buffers, sequence, way, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Start to copy the chunks of a walk, from the last one to the first, which the answer then finds in L2."""
    walk_begin, walk_end, _, _, column = way
    _, key, value, i_b, i_h = tensors
    HALVES: gl.constexpr = halves_of(PARTS)
    KP: gl.constexpr = buffers[AT_ROWS].shape[2]
    STAGES: gl.constexpr = walk_stages_of(KP * PARTS)
    for n in range(walk_end - walk_begin):
        stage = n % STAGES
        t0 = chunk_start(walk_end - 1 - n, sequence, REVERSE)
        mbarrier.wait(buffers[AT_WALK_EMPTY].index(stage), ((n // STAGES) & 1) ^ 1)
        full = buffers[AT_WALK_FULL].index(stage)
        mbarrier.expect(full, 2 * C * (KP * PARTS + HALF * HALVES))
        _copy(key, i_b, i_h, t0, 0, KP * PARTS, full, buffers[AT_ROWS], key_place(stage, 0, PARTS))
        _copy(value, i_b, i_h, t0, column, HALVES * HALF, full, buffers[AT_TILES], value_place(stage, 0, PARTS))


@gluon.jit
def expect_chunk(buffers, stage, PARTS: gl.constexpr, wanted=True):
    """Let a stage be full when the queries, keys and values of a chunk have come."""
    KP: gl.constexpr = buffers[AT_ROWS].shape[2]
    nbytes: gl.constexpr = 2 * C * (2 * KP * PARTS + HALF * halves_of(PARTS))
    mbarrier.expect(buffers[AT_FULL].index(stage), nbytes, pred=wanted)


@gluon.jit
def copy_queries(tensors, buffers, stage, t0, PARTS: gl.constexpr, wanted=True):
    """Start to copy the queries of the chunk from token t0 on, if it is wanted."""
    query, _, _, i_b, i_h = tensors
    KP: gl.constexpr = buffers[AT_ROWS].shape[2]
    full = buffers[AT_FULL].index(stage)
    place = query_place(buffers, stage, 0, PARTS)
    _copy(query, i_b, i_h, t0, 0, KP * PARTS, full, buffers[AT_ROWS], place, wanted)


@gluon.jit
def copy_keys_and_values(tensors, buffers, stage, t0, column, PARTS: gl.constexpr, wanted=True):
    """Start to copy the keys of a chunk, and the values as far as this program has their columns."""
    _, key, value, i_b, i_h = tensors
    KP: gl.constexpr = buffers[AT_ROWS].shape[2]
    full = buffers[AT_FULL].index(stage)
    _copy(key, i_b, i_h, t0, 0, KP * PARTS, full, buffers[AT_ROWS], key_place(stage, 0, PARTS), wanted)
    COLUMNS: gl.constexpr = halves_of(PARTS) * HALF
    _copy(value, i_b, i_h, t0, column, COLUMNS, full, buffers[AT_TILES], value_place(stage, 0, PARTS), wanted)


@gluon.jit
def _copy(tensor, i_b, i_h, t0, column, COLUMNS: gl.constexpr, full, tiles, i, wanted=True):
    """Start to copy so many columns of C tokens of one head to where the i-th of tiles begins."""
    AT_ONCE: gl.constexpr = tensor.block_shape[3]
    for block in gl.static_range(COLUMNS // AT_ONCE):
        place = [i_b, t0, i_h, column + block * AT_ONCE]
        async_load(tensor, place, full, block_of(tiles, i, block, AT_ONCE), pred=wanted)
