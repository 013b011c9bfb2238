"""How the linear maps of a token are cut. Plain arithmetic and a table: what was quickest on an H200."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Input = Literal["plain", "norm", "gate"]
Output = Literal["heads", "residual", "product", "store"]

VECTOR_BATCH = 4
"""Tokens up to which products are summed outside the tensor cores."""

LARGEST_BATCH = 64
"""Tokens that a program of the matrix kernel takes."""

ACCESS_BYTES = 16
"""What a thread loads at once."""

_WARP = 32
_SMALLEST_DOT = 16


@dataclass(frozen=True)
class Vector:
    """Sizes of `matvec_kernel`."""

    rows: int
    """Rows of the weights that a program owns, BN."""
    columns: int
    """Columns that it holds at once, BK."""
    warps: int
    tokens: int = 4
    """Tokens that it takes at most, BB."""


@dataclass(frozen=True)
class Matrix:
    """Sizes of `matmul_kernel`."""

    rows: int
    """Rows of the weights that a program owns, BN."""
    columns: int
    """Columns of a tile, BK."""
    warps: int
    stages: int
    """Tiles under way."""
    split: int
    """Programs that share the columns."""


Cut = Vector | Matrix

VECTOR: Mapping[Output, Vector] = {
    "heads": Vector(rows=4, columns=1024, warps=4),
    "residual": Vector(rows=4, columns=1024, warps=4),
    "product": Vector(rows=2, columns=1024, warps=4),
    "store": Vector(rows=8, columns=1024, warps=4),
}
"""By what is done with the sums; for weights of 2 bytes."""

MATRIX: Mapping[Output, Matrix] = {
    "heads": Matrix(rows=64, columns=128, warps=4, stages=4, split=1),
    "residual": Matrix(rows=64, columns=128, warps=4, stages=4, split=1),
    "product": Matrix(rows=64, columns=64, warps=4, stages=4, split=1),
    "store": Matrix(rows=64, columns=128, warps=4, stages=4, split=1),
}
"""Likewise; the split follows from the number of rows."""

TUNED: dict[tuple[Output, int, int, int], Cut] = {
    ("product", 1, 11008, 4096): Vector(rows=2, columns=4096, warps=8, tokens=1),
    ("heads", 1, 16384, 4096): Vector(rows=4, columns=4096, warps=8, tokens=1),
    ("store", 1, 64000, 4096): Vector(rows=2, columns=4096, warps=8, tokens=1),
    ("residual", 32, 4096, 11008): Matrix(rows=64, columns=128, warps=4, stages=5, split=2),
    ("residual", 32, 4096, 4096): Matrix(rows=64, columns=128, warps=4, stages=5, split=2),
    ("residual", 8, 4096, 4096): Matrix(rows=64, columns=128, warps=4, stages=5, split=2),
    ("product", 1, 5632, 2048): Vector(rows=1, columns=1024, warps=4, tokens=1),
    ("heads", 1, 8192, 2048): Vector(rows=2, columns=1024, warps=4, tokens=1),
    ("residual", 1, 2048, 5632): Vector(rows=4, columns=2048, warps=8, tokens=1),
    ("residual", 1, 2048, 2048): Vector(rows=8, columns=2048, warps=8, tokens=1),
    ("store", 1, 64000, 2048): Vector(rows=2, columns=1024, warps=4, tokens=1),
    ("heads", 32, 8192, 2048): Matrix(rows=64, columns=128, warps=4, stages=5, split=1),
    ("residual", 32, 2048, 5632): Matrix(rows=64, columns=128, warps=4, stages=5, split=4),
    ("residual", 32, 2048, 2048): Matrix(rows=64, columns=128, warps=4, stages=5, split=4),
    ("store", 32, 64000, 2048): Matrix(rows=128, columns=64, warps=4, stages=4, split=1),
    ("heads", 8, 8192, 2048): Matrix(rows=64, columns=128, warps=4, stages=5, split=1),
    ("residual", 8, 2048, 5632): Matrix(rows=64, columns=64, warps=4, stages=6, split=4),
}
"""Cuts of maps that were tried one by one, by (what is done with the sums, power of 2 of the tokens, rows, columns)."""


def cut(output: Output, batch: int, rows: int, columns: int, itemsize: int, processors: int) -> Cut:
    """Return the sizes for a map of `batch` tokens by weights [rows, columns] of `itemsize` bytes.

    float32 has no tensor cores that keep its precision, so its products are always summed outside them.
    """
    tuned = TUNED.get((output, power_of_2(batch), rows, columns))
    if tuned is not None and itemsize == 2:
        return tuned
    if batch <= VECTOR_BATCH or itemsize == 4:
        return _fitted_vector(VECTOR[output], batch, columns, itemsize)
    return _fitted_matrix(MATRIX[output], rows, columns, processors)


def _fitted_vector(wide: Vector, batch: int, columns: int, itemsize: int) -> Vector:
    """Take fewer warps where the columns are few, so that no thread idles."""
    warps, held = wide.warps, wide.columns * 2 // itemsize
    while warps > 1 and held // 2 >= columns:
        warps, held = warps // 2, held // 2
    held = max(held, _WARP * warps * ACCESS_BYTES // itemsize)
    return Vector(wide.rows, held, warps, min(wide.tokens, power_of_2(batch)))


def _fitted_matrix(wide: Matrix, rows: int, columns: int, processors: int) -> Matrix:
    """Share the columns where tiles of rows are too few to busy the chip twice over."""
    held = max(_SMALLEST_DOT, min(wide.columns, power_of_2(columns)))
    split = 1
    while split * 2 * -(-rows // wide.rows) <= 2 * processors and columns >= split * 2 * 2 * held:
        split *= 2
    return Matrix(wide.rows, held, wide.warps, wide.stages, split)


def token_block(batch: int) -> int:
    """Return the tokens that a program of the matrix kernel takes, padding included."""
    return max(_SMALLEST_DOT, power_of_2(batch))


def power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is no smaller."""
    return 1 << (size - 1).bit_length()
