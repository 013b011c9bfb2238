"""When the layer's ops (norm, gate, heads, product) run as fused Triton kernels."""

import warnings
from functools import cache

import torch
from torch import Tensor

from tnllm_export.kernels.dispatch import form_for
from tnllm_export.kernels.tracing import compiles, needs_gradient, runs_untraced

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the fused kernels take. They compute in float32 inside."""

MAX_WIDTH = 16384
"""The widest row whose elements fit in one program's registers."""


def fused(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs as a fused kernel rather than as plain PyTorch.

    Never while a program is traced: torch.export keeps the plain ATen ops, which every runtime knows, and under
    torch.compile Inductor fuses them with their neighbours, which it could not do with an opaque op.
    """
    if compiles():
        return False
    return runs_triton(*tensors)


def unwatched(*tensors: Tensor) -> bool:
    """Whether an op may be called past torch.library: no tracer has to see it, and autograd need not know of it."""
    return runs_untraced(*tensors) and not needs_gradient(*tensors)


def runs_triton(*tensors: Tensor) -> bool:
    """Whether Triton is wanted for these tensors and takes them."""
    return all(tensor.dtype in DTYPES for tensor in tensors) and form_for(tensors[0].device) == "triton"


def fits(name: str, width: int) -> bool:
    """Whether a row kernel takes rows of `width` elements; warns, once per width, where PyTorch has to compute."""
    if width > MAX_WIDTH:
        _warn_of_width(name, width)
    return width <= MAX_WIDTH


@cache
def _warn_of_width(name: str, width: int) -> None:
    warnings.warn(
        f"{name}: found rows of {width} elements; its Triton kernel takes up to {MAX_WIDTH}, so PyTorch computes, "
        "more slowly",
        stacklevel=4,
    )
