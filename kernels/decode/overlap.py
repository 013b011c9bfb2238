"""Launching kernels so that each starts while the one before it ends (programmatic dependent launch, sm_90 and later).

A kernel may read what no kernel of the same token writes, such as weights, before `previous_is_done`; all else after
it. Only then does it let the next one start. So two kernels overlap, never three: what the one before the previous
kernel wrote is there from the start.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tnllm_export.kernels.lightning_attention.launch import can_overlap, is_current
from tnllm_export.kernels.lightning_attention.launch import launch as launch_on_grid


@triton.jit
def previous_is_done(OVERLAP: tl.constexpr):
    """Wait for the kernel before, then let the next one start."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor, ...],
    constants: tuple[Any, ...],
    warps: int,
    overlap: bool,
    first: bool = False,
) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: A Triton function of pointers, then constants, the last of which is OVERLAP.
        programs: Size of the grid.
        tensors: What the pointers point to, all on one device.
        constants: All but OVERLAP.
        warps: Of a program.
        overlap: Whether neighbours may overlap, where the device can do that: this kernel starts before the previous
            one has ended, and the next one before this.
        first: Whether it waits for all work before it nevertheless.
    """
    device = tensors[0].device
    if not is_current(device):
        with torch.cuda.device(device):
            launch(kernel, programs, tensors, constants, warps, overlap, first)
        return
    overlap = overlap and can_overlap(device)
    layouts = tuple([(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors])
    key = (kernel, device, programs, layouts, constants, warps, overlap, first)
    early = overlap and not first
    launch_on_grid(kernel, key, (programs, 1, 1), tensors, (*constants, overlap), warps, overlap=early)
