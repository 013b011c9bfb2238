"""How a sweep is cut: tile sizes per architecture, segments by the number of heads and tokens.

Plain data and arithmetic without torch and Triton: the compiled kernels of a plugin follow the same plan.
"""

from dataclasses import dataclass
from typing import Literal

Handover = Literal["none", "recompute", "chain"]
Activation = Literal["float32", "float16", "bfloat16"]


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


@dataclass(frozen=True)
class SweepPlan:
    """How one call is cut into programs: a grid of [B * H * value blocks, segments]."""

    handover: Handover
    segments: int
    segment_chunks: int


CHAIN_CHUNKS = 8
"""Chunks of a segment in a chain: what all programs hold at once should fit into the L2 cache."""

MAX_SEGMENTS = 65535
"""The longest second axis of a grid."""

RECOMPUTE_SEGMENTS = 4
"""Up to so many segments, walking the tokens before a segment again takes less time than handing states over."""


def sweep_tile(K: int, V: int, activation: Activation, capability: int) -> SweepTile:
    """Return the tile for head sizes K and V on compute capability `capability` (90 for 9.0)."""
    if activation == "float32":
        return SweepTile(
            chunk=32, value_block=min(_power_of_two(V), 32), warps=4, stages=1, state_stages=1, programs_per_processor=2
        )
    wide = K > 128
    large_memory = capability in (80, 90, 100)
    if activation == "float16":
        return SweepTile(
            chunk=64 if not wide else 32,
            value_block=min(_power_of_two(V), 32 if wide else 64),
            warps=4,
            stages=1,
            state_stages=1,
            programs_per_processor=1,
        )
    if large_memory:
        return SweepTile(
            chunk=64,
            value_block=min(_power_of_two(V), 64),
            warps=8 if wide else 4,
            stages=2,
            state_stages=4,
            programs_per_processor=1,
        )
    return SweepTile(
        chunk=32,
        value_block=min(_power_of_two(V), 32 if wide else 64),
        warps=4,
        stages=1,
        state_stages=1,
        programs_per_processor=1,
    )


def sweep_plan(tile: SweepTile, columns: int, T: int, processors: int) -> SweepPlan:
    """Cut T tokens of `columns` = B * H * (value blocks) independent walks for a device of `processors`."""
    chunks = max(-(-T // tile.chunk), 1)
    wanted = processors * tile.programs_per_processor // max(columns, 1)
    if wanted < 2 or chunks < 2:
        return SweepPlan("none", 1, chunks)
    if chunks <= RECOMPUTE_SEGMENTS * CHAIN_CHUNKS:
        segment_chunks = -(-chunks // min(wanted, RECOMPUTE_SEGMENTS))
        return SweepPlan("recompute", -(-chunks // segment_chunks), segment_chunks)
    segment_chunks = max(min(-(-chunks // wanted), CHAIN_CHUNKS), -(-chunks // MAX_SEGMENTS))
    return SweepPlan("chain", -(-chunks // segment_chunks), segment_chunks)


def key_block(K: int) -> int:
    """Return BK, the rows of a state's tile: K, rounded up to a power of two."""
    return max(_power_of_two(K), 16)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
