"""How the decode step is cut: the columns of a state that one program owns. Plain arithmetic, as in `sweep_plan.py`."""

from dataclasses import dataclass

STEP_VALUES = 128 * 128 * 32
"""Values of all states per multiprocessor from which on wide rows keep the memory busy."""

BLOCKS = (16, 32, 64)
"""Columns that a program may own."""


@dataclass(frozen=True)
class StepTile:
    """Compile-time sizes of one kernel variant."""

    value_block: int
    """Columns of the state that one program owns, BV."""
    warps: int


def step_tile(K: int, V: int, heads: int, processors: int) -> StepTile:
    """Return the tile for `heads` = B * H heads: wide rows where they fill the device, narrow ones where not."""
    *_, block = step_blocks(V)
    while block > BLOCKS[0] and heads * -(-V // block) * K * block < STEP_VALUES * processors:
        block //= 2
    return tile_of_block(block)


def step_blocks(V: int) -> tuple[int, ...]:
    """Return the blocks that `step_tile` chooses from for V columns."""
    return tuple(block for block in BLOCKS if block <= max(1 << (V - 1).bit_length(), BLOCKS[0]))


def tile_of_block(block: int) -> StepTile:
    """Return the tile with this block."""
    return StepTile(value_block=block, warps=2 if block == BLOCKS[0] else 4)
