"""Copies into shared memory for `sweep_hopper.py`: who starts them, and what they wait for.

Where three chunks have buffers, the group that makes scores starts the copies, too (`hopper_prepare.py`). With 256 keys
there is room for two, and whoever makes scores is too busy to refill one in time: a warp of its own does nothing else.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

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
    halves_of,
    key_tile,
    query_tile,
    stages_of,
    value_tile,
    walk_stages_of,
)


@gluon.jit
def load(task, reverse, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Bring the chunks of a walk, then those of a segment, each as soon as its buffers are free."""
    in_direction(_load, task, reverse, K, V, PARTS, REVERSE)


@gluon.jit
def _load(task, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    buffers, sequence, way, query, key, value = task
    _, n_chunks, length = sequence
    walk_begin, walk_end, first, end, column = way
    key = key_map(key, buffers, length, K)
    value = value_map(value, buffers, length, V)
    copy_walk(key, value, buffers, n_chunks, walk_begin, walk_end, column, PARTS, REVERSE)
    query = key_map(query, buffers, length, K)
    STAGES: gl.constexpr = stages_of(K)
    for i in range(first, end):
        n = i - first
        stage = n % STAGES
        t0 = chunk_start(i, n_chunks, REVERSE)
        # The owners are done with queries before they are with the rest of a chunk.
        mbarrier.wait(buffers[AT_ASKED].index(stage), (n // STAGES) & 1)
        _expect_chunk(key, value, buffers, stage, PARTS)
        _copy_rows(query, buffers, stage, t0, True, PARTS)
        mbarrier.wait(buffers[AT_EMPTY].index(stage), (n // STAGES) & 1)
        _copy_rows(key, buffers, stage, t0, False, PARTS)
        _copy_values(value, buffers, stage, t0, column, PARTS)


@gluon.jit
def key_map(memory, buffers, length, K: gl.constexpr):
    """Make the tensor map of keys or queries. `memory`: address, and stride of tokens."""
    rows = buffers[AT_ROWS]
    KP: gl.constexpr = rows.shape[2]
    return tma.make_tensor_descriptor(memory[0], [gl.maximum(length, 1), K], [memory[1], 1], [C, KP], rows.layout)


@gluon.jit
def value_map(memory, buffers, length, V: gl.constexpr):
    """Make the tensor map of values. `memory`: address, and stride of tokens."""
    layout: gl.constexpr = buffers[AT_TILES].layout
    return tma.make_tensor_descriptor(memory[0], [gl.maximum(length, 1), V], [memory[1], 1], [C, HALF], layout)


@gluon.jit
def copy_walk(key, value, buffers, n_chunks, walk_begin, walk_end, column, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Start to copy the chunks of a walk, from the last one to the first, which the answer then finds in L2."""
    for n in range(walk_end - walk_begin):
        _copy_walked(key, value, buffers, n, chunk_start(walk_end - 1 - n, n_chunks, REVERSE), column, PARTS)


@gluon.jit
def _copy_walked(key, value, buffers, n, t0, column, PARTS: gl.constexpr):
    """Start to copy the n-th chunk of a walk when it has free buffers."""
    HALVES: gl.constexpr = halves_of(PARTS)
    KP: gl.constexpr = key.block_type.shape[1]
    STAGES: gl.constexpr = walk_stages_of(KP * PARTS)
    stage = n % STAGES
    mbarrier.wait(buffers[AT_WALK_EMPTY].index(stage), ((n // STAGES) & 1) ^ 1)
    full = buffers[AT_WALK_FULL].index(stage)
    mbarrier.expect(full, key.block_type.nbytes * PARTS + value.block_type.nbytes * HALVES)
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(key, [t0, part * KP], full, key_tile(buffers, stage, part, PARTS))
    for half in gl.static_range(HALVES):
        place = [t0, column + half * HALF]
        tma.async_copy_global_to_shared(value, place, full, value_tile(buffers, stage, half, PARTS))


@gluon.jit
def copy_chunk(maps, buffers, stage, t0, column, PARTS: gl.constexpr, wanted):
    """Start to copy the chunk from token t0 on, if it is wanted, into the buffers of a stage, which are free."""
    query, key, value = maps
    _expect_chunk(key, value, buffers, stage, PARTS, wanted)
    _copy_rows(key, buffers, stage, t0, False, PARTS, wanted)
    _copy_rows(query, buffers, stage, t0, True, PARTS, wanted)
    _copy_values(value, buffers, stage, t0, column, PARTS, wanted)


@gluon.jit
def _expect_chunk(key, value, buffers, stage, PARTS: gl.constexpr, wanted=True):
    """Let a stage be full when the queries, keys and values of a chunk have come."""
    nbytes: gl.constexpr = key.block_type.nbytes * 2 * PARTS + value.block_type.nbytes * halves_of(PARTS)
    mbarrier.expect(buffers[AT_FULL].index(stage), nbytes, pred=wanted)


@gluon.jit
def _copy_rows(rows, buffers, stage, t0, QUERIES: gl.constexpr, PARTS: gl.constexpr, wanted=True):
    """Start to copy a chunk's queries, or else its keys."""
    KP: gl.constexpr = rows.block_type.shape[1]
    full = buffers[AT_FULL].index(stage)
    for part in gl.static_range(PARTS):
        buffer = query_tile(buffers, stage, part, PARTS) if QUERIES else key_tile(buffers, stage, part, PARTS)
        tma.async_copy_global_to_shared(rows, [t0, part * KP], full, buffer, pred=wanted)


@gluon.jit
def _copy_values(value, buffers, stage, t0, column, PARTS: gl.constexpr, wanted=True):
    """Start to copy a chunk's values, as far as this program has their columns."""
    full = buffers[AT_FULL].index(stage)
    for half in gl.static_range(halves_of(PARTS)):
        buffer = value_tile(buffers, stage, half, PARTS)
        tma.async_copy_global_to_shared(value, [t0, column + half * HALF], full, buffer, pred=wanted)


@gluon.jit
def prefetch(memory, t0, length, column, COLUMNS: gl.constexpr):
    """Bring the 64 tokens from t0 on, as far as there are any, into L2, by four warps.

    Args:
        memory: Address, and stride of tokens.
        t0: First token.
        length: Valid tokens of the sequence.
        column: First of COLUMNS columns.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 * HALF // COLUMNS, COLUMNS // HALF], [4, 1], [1, 0])
    row = gl.maximum(gl.minimum(t0 + gl.arange(0, C, layout=gl.SliceLayout(1, layout)), length - 1), 0)
    line = column + gl.arange(0, COLUMNS // HALF, layout=gl.SliceLayout(0, layout)) * HALF
    places = memory[0] + (row.to(gl.int64) * memory[1])[:, None] + line[None, :]
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=gl.int32, is_pure=False, pack=1
    )
