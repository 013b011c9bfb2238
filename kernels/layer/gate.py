"""The gate u ⊙ N(o) with N the SRMSNorm over the last dimension: N(o) is never written to memory.

Forward reads u and o and writes g; backward reads dg, u and o and writes du and do.
Source: arXiv 2307.14995, section 2.1.3, in the released form.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tnllm_export.kernels.contract import NAMESPACE, accumulator_dtype
from tnllm_export.kernels.layer.form import fits, fused, runs_triton, unwatched
from tnllm_export.kernels.layer.norm import EPSILON, srmsnorm_backward_pytorch, srmsnorm_pytorch


def gated_norm(gate: Tensor, x: Tensor) -> Tensor:
    """Compute gate ⊙ x rsqrt(mean(x²) + 1e-6) over the last dimension, in float32 inside.

    A fused kernel on CUDA, plain PyTorch elsewhere and while a program is traced; `use_kernels` chooses. The fused
    kernel rounds once, plain PyTorch rounds N(x) to x's dtype first.

    Args:
        gate: [..., D] float32, float16, bfloat16 or float64; a chunk of the fused projection is read where it lies.
        x: [..., D], same shape and dtype.

    Returns:
        [..., D].
    """
    if gate.dtype == x.dtype and fused(gate, x):
        gated: Tensor = _gated_norm(gate, x, True) if unwatched(gate, x) else gated_norm_op(gate, x)
        return gated
    return gate * srmsnorm_pytorch(x, x.dtype)


def gated_norm_backward_pytorch(grad: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_norm` by PyTorch's own ops: those of gate and x."""
    wide = accumulator_dtype(x.dtype)
    grad_gate = grad.to(wide) * srmsnorm_pytorch(x, wide)
    return grad_gate.to(gate.dtype), srmsnorm_backward_pytorch(grad.to(wide) * gate.to(wide), x)


def _gated_norm(gate: Tensor, x: Tensor, triton: bool) -> Tensor:
    _check(gate, x)
    if triton and fits("gated_norm", x.shape[-1]):
        return _triton().gated_norm_triton(gate, x, EPSILON)  # type: ignore[no-any-return]
    return (gate * srmsnorm_pytorch(x, x.dtype)).contiguous()


# Triton is imported when it is first wanted.
@cache
def _triton() -> Any:
    return import_module("tnllm_export.kernels.layer.triton_kernels.gate")


@torch.library.custom_op(f"{NAMESPACE}::gated_norm", mutates_args=())
def gated_norm_op(gate: Tensor, x: Tensor) -> Tensor:
    """Compute `gated_norm` as one op, contiguous; the form is chosen when it runs."""
    return _gated_norm(gate, x, runs_triton(gate, x))


@gated_norm_op.register_fake
def _(gate: Tensor, x: Tensor) -> Tensor:
    _check(gate, x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::gated_norm_backward", mutates_args=())
def gated_norm_backward(grad: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_norm`: those of gate and x, contiguous."""
    if runs_triton(grad, gate, x) and fits("gated_norm", x.shape[-1]):
        return _triton().gated_norm_backward_triton(grad, gate, x, EPSILON)  # type: ignore[no-any-return]
    grad_gate, grad_x = gated_norm_backward_pytorch(grad, gate, x)
    return grad_gate.contiguous(), grad_x.contiguous()


@gated_norm_backward.register_fake
def _(grad: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )


def _check(gate: Tensor, x: Tensor) -> None:
    if gate.shape != x.shape:
        raise ValueError(f"gate has shape {list(gate.shape)}; expected {list(x.shape)} like x")
    if gate.dtype != x.dtype:
        raise TypeError(f"gate is {gate.dtype}; expected {x.dtype} like x")


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = gated_norm_backward(grad, *ctx.saved_tensors)
    return grads


gated_norm_op.register_autograd(_backward, setup_context=_save_for_backward)
