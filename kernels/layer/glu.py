"""SGLU's product a ⊙ b, whose backward reads the incoming gradient once for both factors.

Forward there is nothing to fuse: one multiplication reads a and b and writes the product, as PyTorch's does. Its
backward in PyTorch is two multiplications, six passes over memory where one kernel makes five.
Source: arXiv 2307.14995, section 2.1.3.
"""

from typing import Any

import torch
from torch import Tensor

from tnllm_export.kernels.contract import NAMESPACE
from tnllm_export.kernels.layer.form import fused, runs_triton


def glu_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a ⊙ b, both [..., D] of one shape; on CUDA the backward is one kernel.

    Plain PyTorch elsewhere, while a program is traced, and where no gradient is asked for; `use_kernels` chooses.
    """
    differentiated = torch.is_grad_enabled() and a.requires_grad and b.requires_grad
    if differentiated and a.shape == b.shape and a.dtype == b.dtype and fused(a, b):
        product: Tensor = glu_product_op(a, b)
        return product
    return a * b


@torch.library.custom_op(f"{NAMESPACE}::glu_product", mutates_args=())
def glu_product_op(a: Tensor, b: Tensor) -> Tensor:
    """Compute `glu_product` as one op, contiguous."""
    _check(a, b)
    return (a * b).contiguous()


@glu_product_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::glu_product_backward", mutates_args=())
def glu_product_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `glu_product`: grad ⊙ b and grad ⊙ a, contiguous."""
    if runs_triton(grad, a, b):
        from tnllm_export.kernels.layer.triton_kernels.glu import glu_product_backward_triton  # noqa: PLC0415

        return glu_product_backward_triton(grad, a, b)
    return (grad * b).contiguous(), (grad * a).contiguous()


@glu_product_backward.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
    )


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"a has shape {list(a.shape)}; expected {list(b.shape)} like b")
    if a.dtype != b.dtype:
        raise TypeError(f"a is {a.dtype}; expected {b.dtype} like b")


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = glu_product_backward(grad, *ctx.saved_tensors)
    return grads


glu_product_op.register_autograd(_backward, setup_context=_save_for_backward)
