"""What the row kernels share: the layout of rows, how many a program takes, and how a forward is launched."""

# Triton code has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnllm_export.kernels.lightning_attention.launch import is_current, launch


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        rows: Rows that a program holds at once.
        warps: Warps of a program.
        per_processor: Programs per multiprocessor of a persistent launch; 0 launches one program per tile of rows.
        stages: Tiles that a persistent program has under way.
    """

    rows: int
    warps: int
    per_processor: int = 0
    stages: int = 1

    def grid(self, rows: int, device: torch.device) -> tuple[int]:
        """Return the number of programs that share `rows` rows."""
        tiles = -(-rows // self.rows)
        return (min(tiles, self.per_processor * _processors(device)) if self.per_processor else tiles,)

    def cut(self, numbers: tuple[int, ...], device: torch.device, width: int, epsilon: float) -> "Cut":
        """Return the launch over numbers[0] rows of `width` elements."""
        constants = self.constants(width, epsilon)
        warps = constants.pop("num_warps")
        return Cut((*self.grid(numbers[0], device), 1, 1), numbers, tuple(constants.values()), warps)

    def constants(self, width: int, epsilon: float) -> dict[str, Any]:
        """Return what a row kernel is compiled for, in the order of its arguments, and its warps."""
        return {
            "epsilon": epsilon,
            "D": width,
            "BD": triton.next_power_of_2(width),
            "BR": self.rows,
            "STAGES": self.stages,
            "num_warps": self.warps,
        }


@dataclass(frozen=True, eq=False)
class Cut:
    """All of a launch that follows from sizes, strides, dtypes and device; one object for each, which is its own key.

    Attributes:
        grid: Programs.
        numbers: The kernel's arguments between tensors and constants.
        constants: What it is compiled for.
        warps: Of a program.
    """

    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    warps: int


@dataclass(frozen=True)
class Tile:
    """How an elementwise kernel is launched: elements that a program takes, and its warps."""

    elements: int
    warps: int


def launch_for(table: dict[int, Launch], width: int) -> Launch:
    """Return the launch for rows of `width` elements; of narrower rows than the table's a program takes more."""
    block = triton.next_power_of_2(width)
    narrowest = min(table)
    if block >= narrowest:
        return table[block]
    launch = table[narrowest]
    return Launch(launch.rows * narrowest // block, launch.warps, launch.per_processor, launch.stages)


def start(kernel: Any, cut: Cut, x: Tensor, *others: Tensor | None) -> None:
    """Launch a kernel on the device of x. None stands for a tensor that the constants leave out."""
    if not is_current(x.device):
        with torch.cuda.device(x.device):
            start(kernel, cut, x, *others)
        return
    tensors = (x, *others)
    misalignment = [0 if tensor is None else tensor.data_ptr() & 15 for tensor in tensors]
    launch(kernel, (cut, *misalignment), cut.grid, tensors + cut.numbers, cut.constants, cut.warps)


def as_rows(x: Tensor) -> Tensor:
    """Give x [..., D] as [outer, inner, D] with a dense last dimension: a view, unless its strides allow none."""
    if x.dim() == 3 and x.stride(2) == 1:
        return x
    D = x.shape[-1]
    inner = x.shape[-2] if x.dim() > 1 else 1
    x = x.reshape(x.numel() // (inner * D), inner, D) if x.numel() else x.new_empty(0, inner, D)
    return x if x.stride(2) == 1 or D == 1 else x.contiguous()


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Offset of the first element of each row of a tensor [outer, inner, width]; int64."""
    return (rows // inner).to(tl.int64) * stride_outer + (rows % inner).to(tl.int64) * stride_inner
