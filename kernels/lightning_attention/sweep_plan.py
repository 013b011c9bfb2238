"""How a sweep is cut: tile sizes per architecture, segments by the number of heads and tokens.

Plain data and arithmetic without torch and Triton: the compiled kernels of a plugin follow the same plan.
"""

from dataclasses import dataclass, replace
from typing import Literal

Handover = Literal["none", "recompute", "lookback"]
Activation = Literal["float32", "float16", "bfloat16"]
Kernel = Literal["portable", "hopper"]
"""`sweep.py` or `sweep_hopper.py`."""


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


SHORT_CALL = 16
"""Up to so many chunks, walking the tokens before a segment again takes less time than waiting for their state."""

RECOMPUTE_SEGMENTS = 4
"""Segments of a call of so few chunks, at most: each walks all tokens before it."""

_HOPPER_TILE = SweepTile(
    chunk=64,
    value_block=128,
    warps=4,
    stages=3,
    state_stages=3,
    programs_per_processor=1,
    kernel="hopper",
    further_warps=8,
)


def hopper_tile(K: int, V: int, activation: Activation) -> SweepTile | None:
    """Return the tile of `sweep_hopper.py` for these head sizes; None where it takes them not."""
    tile = _HOPPER_TILE
    if K == 256:
        tile = replace(tile, value_block=64, parts=2, stages=2, state_stages=2, long_segment=64)
    fits = activation == "bfloat16" and K in (64, 128, 256) and V % tile.value_block == 0
    return tile if fits else None


def sweep_tile(K: int, V: int, activation: Activation, capability: int) -> SweepTile:
    """Return the tile for head sizes K and V on compute capability `capability` (90 for 9.0).

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


def sweep_plan(tile: SweepTile, columns: int, T: int, processors: int) -> SweepPlan:
    """Cut T tokens of `columns` = B * H * (value blocks) independent walks for a device of `processors`."""
    chunks = max(-(-T // tile.chunk), 1)
    columns = max(columns, 1)
    wanted = processors * tile.programs_per_processor // columns
    if wanted < 2 or chunks < 2:
        return SweepPlan("none", 1)
    if chunks <= SHORT_CALL:
        return SweepPlan("recompute", min(max(processors // columns, 2), RECOMPUTE_SEGMENTS, chunks))
    if chunks >= 2 * tile.long_segment * wanted:
        wanted *= 2
    return SweepPlan("lookback", min(wanted, chunks))


def key_block(K: int) -> int:
    """Return BK, the rows of a state's tile: K, rounded up to a power of two."""
    return max(_power_of_two(K), 16)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
