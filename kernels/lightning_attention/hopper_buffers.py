"""What lies in shared memory while `sweep_hopper.py` runs, and how much of it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# triton 3.9 renamed them.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

C = gl.constexpr(64)  # tokens per chunk
HALF = gl.constexpr(64)  # columns of the state that one group of warps owns
SCORE_STAGES = gl.constexpr(2)  # chunks whose scores have buffers
OUT_STAGES = gl.constexpr(2)  # chunks whose output has one

# Places in the tuple of all buffers.
AT_ROWS = gl.constexpr(0)  # [C, K / PARTS] each: keys of all stages, then queries
AT_TILES = gl.constexpr(1)  # [C, 64] each: values of all stages, then scores in two parts
AT_OUT = gl.constexpr(2)  # [C, 64] each: outputs
AT_PARTIAL = gl.constexpr(3)  # what one owner has of an output, for the other
AT_DECAYS = gl.constexpr(4)  # of values, until a chunk's end
AT_ANSWER_DECAYS = gl.constexpr(5)
# Barriers: buffers that are filled or free, by chunk; the same during a walk; what is prepared; an output that lacks
# the other owner's part; queries alone that are free, where a warp waits for them.
AT_FULL = gl.constexpr(6)
AT_EMPTY = gl.constexpr(7)
AT_WALK_FULL = gl.constexpr(8)
AT_WALK_EMPTY = gl.constexpr(9)
AT_SCORED = gl.constexpr(10)
AT_EXCHANGED = gl.constexpr(11)
AT_ASKED = gl.constexpr(12)


@gluon.constexpr_function
def stages_of(K):
    """Chunks whose queries, keys and values have buffers."""
    return 3 if K <= 128 else 2


@gluon.constexpr_function
def halves_of(PARTS):
    """Blocks of HALF columns that a program owns."""
    return 2 if PARTS == 1 else 1


@gluon.constexpr_function
def walk_stages_of(K):
    """Chunks of a walk that have buffers. Where two are too few, keys have those of queries, too, values of scores."""
    return 3 if K <= 128 else 4


@gluon.jit
def block_of(tiles, i, block: gl.constexpr, COLUMNS: gl.constexpr):
    """One block [1, C, 1, COLUMNS] of a tensor map: the block-th from the i-th of tiles [N, C, columns] on."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # Wide tiles and blocks are rows of such that have 64 columns.
    N: gl.constexpr = tiles.shape[0] * tiles.shape[2] // COLUMNS
    blocks = reinterpret(tiles, gl.bfloat16, [N, 1, C, 1, COLUMNS], layout)
    return blocks.index(i * tiles.shape[2] // COLUMNS + block)


@gluon.jit
def key_place(stage, part, PARTS: gl.constexpr):
    """Place of a stage's keys among the row tiles."""
    return stage * PARTS + part


@gluon.jit
def query_place(buffers, stage, part, PARTS: gl.constexpr):
    """Place of a stage's queries among the row tiles."""
    STAGES: gl.constexpr = buffers[AT_ROWS].shape[0] // (2 * PARTS)
    return (STAGES + stage) * PARTS + part


@gluon.jit
def value_place(stage, half, PARTS: gl.constexpr):
    """Place of a stage's values among the tiles."""
    return stage * halves_of(PARTS) + half


@gluon.jit
def key_tile(buffers, stage, part, PARTS: gl.constexpr):
    """Keys of a stage, [C, K / PARTS]."""
    return buffers[AT_ROWS].index(key_place(stage, part, PARTS))


@gluon.jit
def query_tile(buffers, stage, part, PARTS: gl.constexpr):
    """Queries of a stage, [C, K / PARTS]."""
    return buffers[AT_ROWS].index(query_place(buffers, stage, part, PARTS))


@gluon.jit
def value_tile(buffers, stage, half, PARTS: gl.constexpr):
    """Values of a stage, [C, HALF]."""
    return buffers[AT_TILES].index(value_place(stage, half, PARTS))


@gluon.jit
def score_tile(buffers, n, part):
    """One of two parts of the n-th chunk's scores, [C, C]."""
    FIRST: gl.constexpr = buffers[AT_TILES].shape[0] - 2 * SCORE_STAGES
    return buffers[AT_TILES].index(FIRST + n % SCORE_STAGES * 2 + part)
