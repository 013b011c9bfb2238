"""How the decode step is cut: the columns of a state that one program owns. Plain arithmetic, as in `sweep_plan.py`."""

from dataclasses import dataclass

STEP_PROGRAMS = 16
"""Programs per multiprocessor: wide blocks, whose rows memory likes, only where as many are left."""

BLOCKS = (16, 32, 64)
"""Columns that a program may own."""

LARGEST_TILE = 128 * 64
"""Values that a program keeps in registers."""

OLDEST_OVERLAP = 90
"""The oldest compute capability on which a kernel may start while the one before it ends: by a programmatic dependent
launch."""


@dataclass(frozen=True)
class StepTile:
    """Compile-time sizes of one kernel variant."""

    value_block: int
    """Columns of the state that one program owns, BV."""
    warps: int


def step_tile(K: int, V: int, heads: int, processors: int) -> StepTile:
    """Return the tile for `heads` = B * H heads: wide rows where they fill the device, narrow ones where not."""
    *_, block = step_blocks(K, V)
    while block > BLOCKS[0] and heads * -(-V // block) < STEP_PROGRAMS * processors:
        block //= 2
    return tile_of_block(block)


def step_blocks(K: int, V: int) -> tuple[int, ...]:
    """Return the blocks that `step_tile` chooses from for states [K, V]."""
    most = max(min(1 << (V - 1).bit_length(), LARGEST_TILE // K), BLOCKS[0])
    return tuple(block for block in BLOCKS if block <= most)


def tile_of_block(block: int) -> StepTile:
    """Return the tile with this block."""
    return StepTile(value_block=block, warps=2 if block == BLOCKS[0] else 4)
