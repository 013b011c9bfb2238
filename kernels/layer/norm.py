"""SRMSNorm, x rsqrt(mean(x²) + 1e-6) over the last dimension without a weight: one pass over memory each way.

Forward reads x and writes y; backward reads dy and x and writes dx. rstd is computed again: its row is read anyway.
Source: arXiv 2307.14995, section 2.1.4.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tnllm_export.kernels.contract import NAMESPACE, accumulator_dtype
from tnllm_export.kernels.layer.form import fits, fused, runs_triton, unwatched

EPSILON = 1e-6


def srmsnorm(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute x rsqrt(mean(x²) + 1e-6) over the last dimension, in float32 inside (float64 for float64).

    A fused kernel on CUDA, plain PyTorch elsewhere and while a program is traced; `use_kernels` chooses.

    Args:
        x: [..., D] float32, float16, bfloat16 or float64; none is copied whose last dimension is dense.
        dtype: Of the result; default: that of x. Spares a cast where the reader wants another.

    Returns:
        [..., D].
    """
    dtype = dtype or x.dtype
    if not fused(x):
        return srmsnorm_pytorch(x, dtype)
    return _srmsnorm(x, dtype, True) if unwatched(x) else srmsnorm_op(x, dtype)


def srmsnorm_pytorch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `srmsnorm` by PyTorch's own ops."""
    wide = x.to(accumulator_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(dtype)


def srmsnorm_backward_pytorch(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `srmsnorm` by PyTorch's own ops: dx = rstd (dy - x rstd² mean(dy x))."""
    wide, dy = x.to(accumulator_dtype(x.dtype)), grad.to(accumulator_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return (rstd * (dy - wide * (rstd.square() * (dy * wide).mean(-1, keepdim=True)))).to(x.dtype)


def _srmsnorm(x: Tensor, dtype: torch.dtype, triton: bool) -> Tensor:
    if triton and fits("srmsnorm", x.shape[-1]):
        return _triton().srmsnorm_triton(x, dtype, EPSILON)  # type: ignore[no-any-return]
    return srmsnorm_pytorch(x, dtype).contiguous()


# Triton is imported when it is first wanted.
@cache
def _triton() -> Any:
    return import_module("tnllm_export.kernels.layer.triton_kernels.norm")


@torch.library.custom_op(f"{NAMESPACE}::srmsnorm", mutates_args=())
def srmsnorm_op(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `srmsnorm` as one op, contiguous; the form is chosen when it runs."""
    return _srmsnorm(x, dtype, runs_triton(x))


@srmsnorm_op.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op(f"{NAMESPACE}::srmsnorm_backward", mutates_args=())
def srmsnorm_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `srmsnorm` in x's dtype, contiguous."""
    if runs_triton(grad, x) and fits("srmsnorm", x.shape[-1]):
        return _triton().srmsnorm_backward_triton(grad, x, EPSILON)  # type: ignore[no-any-return]
    return srmsnorm_backward_pytorch(grad, x).contiguous()


@srmsnorm_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return srmsnorm_backward(grad, *ctx.saved_tensors), None


srmsnorm_op.register_autograd(_backward, setup_context=_save_for_backward)
