"""How a sweep is cut: tile sizes per architecture, segments by the number of heads and tokens.

Plain data and arithmetic without torch and Triton: the compiled kernels of a plugin follow the same plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Handover = Literal["none", "recompute", "lookback"]
Activation = Literal["float32", "float16", "bfloat16"]
Kernel = Literal["portable", "hopper"]
"""`sweep.py` or `sweep_hopper.py`."""


WALK_COST = 0.37
"""Time of a chunk that is walked without output, relative to one with output: 0.77 to 2.1 µs for `sweep_hopper.py` on
an H200. The portable kernel is cut by the same number, which was not measured for it."""

TALL_WALK_COST = 0.31
"""The same for `sweep_hopper.py` with more than 128 keys."""

RECOMPUTE_CHUNKS = 256
"""A segment of a call of up to so many chunks may walk all before it again. Later, few heads remember the beginning."""


@dataclass(frozen=True)
class SweepTile:
    """Compile-time sizes of one kernel variant."""

    chunk: int
    """Tokens per chunk, C."""
    value_block: int
    """Columns of the state that one program owns, BV."""
    warps: int
    stages: int
    """Chunks in flight."""
    state_stages: int
    """Chunks in flight while the state alone is computed."""
    programs_per_processor: int
    """Programs that a multiprocessor holds at once: by it, segments are counted."""
    answer_cost: float = 1.0
    """Time of a chunk with its output, relative to that of other tiles for the same heads."""
    walk_cost: float = WALK_COST
    """Time of a chunk without output, in chunks with it."""
    handover_cost: float = 2.5
    """Time, in chunks with their output, that goes by until each of four segments has the states before it."""
    long_segment: int = 128
    """Segments are cut in two where the halves have so many chunks: heads that remember long walk theirs twice, and
    then delay the end less."""
    kernel: Kernel = "portable"
    parts: int = 1
    """Groups of warps that a state's rows are cut among, in the kernel for Hopper."""
    further_warps: int = 0
    """Warps that the kernel adds for other work."""


@dataclass(frozen=True)
class SweepPlan:
    """How one call is cut into programs: a grid of [B * H * value blocks, segments]."""

    handover: Handover
    segments: int


_HOPPER_TILE = SweepTile(
    chunk=64,
    value_block=128,
    warps=4,
    stages=3,
    state_stages=3,
    programs_per_processor=1,
    handover_cost=2.6,
    kernel="hopper",
    further_warps=8,
)


def hopper_tiles(K: int, V: int, activation: Activation) -> tuple[SweepTile, ...]:
    """Return the tiles of `sweep_hopper.py` for these head sizes; none where it takes them not."""
    if activation != "bfloat16" or K not in (64, 128, 256):
        return ()
    # Half of the columns: more programs to walk a short sequence, which take more than half of the time.
    narrow = replace(_HOPPER_TILE, value_block=64, parts=2, answer_cost=0.71, handover_cost=3.5)
    # Two chunks have buffers, so a warp of its own starts the copies; warps come in groups of four.
    tall = replace(
        narrow,
        stages=2,
        state_stages=4,
        further_warps=12,
        answer_cost=1.0,
        walk_cost=TALL_WALK_COST,
        handover_cost=3.4,
        long_segment=64,
    )
    tiles = {
        64: (_HOPPER_TILE,),
        128: (_HOPPER_TILE, narrow),
        256: (tall,),
    }[K]
    return tuple(tile for tile in tiles if V % tile.value_block == 0)


def sweep_tiles(K: int, V: int, activation: Activation, capability: int) -> tuple[SweepTile, ...]:
    """Return the tiles that a plan may choose among on compute capability `capability` (90 for 9.0)."""
    tiles = hopper_tiles(K, V, activation) if capability == 90 else ()
    return tiles or (sweep_tile(K, V, activation, capability),)


def sweep_tile(K: int, V: int, activation: Activation, capability: int) -> SweepTile:
    """Return the tile of `sweep.py` for head sizes K and V on compute capability `capability` (90 for 9.0).

    Sizes for 9.0 were measured. Others are the largest that the compiler fits into registers and shared memory.
    """
    columns = _power_of_two(V)
    wide = K > 128
    if activation == "float32":
        # Products run on the general units, which hold both operands in registers: small tiles, many threads.
        return SweepTile(
            chunk=16,
            value_block=min(columns, 32),
            warps=8 if K > 64 else 4,
            stages=1,
            state_stages=1,
            programs_per_processor=1 if K > 64 else 2,
        )
    if activation == "float16":
        return SweepTile(
            chunk=64 if capability == 90 and not wide else 32,
            value_block=min(columns, 32 if wide else 64),
            warps=8 if wide else 4,
            stages=1,
            state_stages=1,
            programs_per_processor=1 if wide or capability == 90 else 2,
        )
    if capability == 90 or (capability == 100 and not wide):
        return SweepTile(
            chunk=64,
            value_block=min(columns, 64),
            warps=8 if wide else 4,
            stages=2,
            state_stages=3,
            programs_per_processor=1 if wide else 2,
        )
    large_memory = capability in (80, 100)
    return SweepTile(
        chunk=32,
        value_block=min(columns, 64 if large_memory or not wide else 32),
        warps=8 if wide else 4,
        stages=2,
        state_stages=3 if large_memory else 2,
        programs_per_processor=2 if large_memory and not wide else 1,
    )


def sweep_plan(tiles: Sequence[SweepTile], heads: int, V: int, T: int, processors: int) -> tuple[SweepTile, SweepPlan]:
    """Choose among tiles, and cut T tokens of `heads` = B * H heads with V columns for a device of `processors`."""
    _, tile, plan = min(
        ((cost, tile, plan) for tile in tiles for cost, plan in _plans(tile, heads, V, T, processors)),
        key=lambda option: option[0],
    )
    chunks = -(-T // tile.chunk)
    if plan.handover == "lookback" and chunks >= 2 * tile.long_segment * plan.segments:
        plan = replace(plan, segments=2 * plan.segments)
    return tile, plan


def _plans(tile: SweepTile, heads: int, V: int, T: int, processors: int) -> Iterator[tuple[float, SweepPlan]]:
    """Yield what may be done with a tile, and about how long it takes. `plan.cpp` counts in the same order."""
    columns = max(heads * -(-V // tile.value_block), 1)
    chunks = max(-(-T // tile.chunk), 1)
    slots = processors * tile.programs_per_processor
    cost = tile.answer_cost * chunks
    yield cost * -(-columns // slots), SweepPlan("none", 1)
    walk = tile.walk_cost
    left = 1.0 - walk
    for segments in range(2, min(slots // columns, chunks) + 1):
        left *= 1.0 - walk
        # Each is so much shorter than the one before that all end at once, and the last one still half a chunk long.
        last = chunks * walk * left / ((1.0 - left) * (1.0 - walk))
        if chunks <= RECOMPUTE_CHUNKS and last >= 0.5:
            yield cost * walk / (1.0 - left), SweepPlan("recompute", segments)
        shared = cost * (1.0 + walk) / segments
        yield shared + tile.answer_cost * tile.handover_cost * (4 + segments) / 8.0, SweepPlan("lookback", segments)


def key_block(K: int) -> int:
    """Return BK, the rows of a state's tile: K, rounded up to a power of two."""
    return max(_power_of_two(K), 16)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
