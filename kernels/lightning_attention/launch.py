"""Launching a kernel variant again without Triton's launcher finding out anew which variant it is.

Triton binds, types and hashes some forty arguments at each launch, which takes longer than a short sequence's kernel.
Here the caller's key stands for all that this depends on, and what is compiled under it is launched directly.
"""

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
import triton

from tnllm_export.kernels.dispatch import interpreted
from tnllm_export.kernels.lightning_attention.step_plan import OLDEST_OVERLAP

LIMIT = 4096
"""Keys that are remembered; they hold sizes, and a server sees many."""

_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    key: Hashable,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    *,
    overlap: bool = False,
) -> None:
    """Launch `kernel` on the current device and stream.

    Args:
        kernel: A Triton function.
        key: Fixes the grid, the kernel, the device, all numbers, the dtypes of all tensors, and how far each tensor is
            from a multiple of 16 bytes: all that Triton compiles different code for.
        grid: Programs.
        arguments: Those that are no constants, in order.
        constants: The others, which come last, in order.
        warps: Of a program.
        overlap: Start while the kernel before ends; this one then waits for it before it touches memory.
    """
    run = _compiled.get(key)
    if run is not None:
        run(*arguments, *constants)
        return
    options = {"launch_pdl": True} if overlap else {}
    compiled = kernel[grid](*arguments, *constants, num_warps=warps, **options)
    if compiled is None:  # interpreted
        return
    if len(_compiled) >= LIMIT:
        _compiled.clear()
    _compiled[key] = compiled[grid]


def can_overlap(device: torch.device) -> bool:
    """Whether kernels may start while the one before ends (programmatic dependent launch)."""
    return capability(device) >= OLDEST_OVERLAP


def is_current(device: torch.device) -> bool:
    """Whether kernels are launched on `device` as things stand. The interpreter runs them anywhere."""
    return device.type != "cuda" or device.index == torch._C._cuda_getDevice()


def allocate_with_torch() -> None:
    """Let kernels that make tensor maps have their memory from torch, stream-ordered and fit for capture.

    Called for each launch: autograd runs a backward in a context of its own.
    """
    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@cache
def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; 80 where kernels are interpreted: they are then the portable ones."""
    if device.type != "cuda" or interpreted():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; those of an H200 where kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
