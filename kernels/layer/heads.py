"""From the fused projection to the heads' q, k, v and the gate u: SiLU on q and k, LRPE where the layer has it.

The forward reads q and k where the projection wrote them and writes them once, activated and, with LRPE, rotated to
twice the width; v and u are views. The backward writes the projection's whole gradient in one pass, where autograd's
own would write each of the four parts and then copy them together. Source: arXiv 2307.14995, section 2.1, in the
released form.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tnllm_export.kernels.contract import NAMESPACE, accumulator_dtype
from tnllm_export.kernels.layer.form import fused, runs_triton, unwatched

Heads = tuple[Tensor, Tensor, Tensor, Tensor]

MAX_HEAD_DIM = 1024
"""The widest head that a program of the kernels takes."""


def split_heads(projected: Tensor, heads: int, theta: Tensor | None = None, positions: Tensor | None = None) -> Heads:
    """Split projected [B, T, 4 d] into SiLU(q), SiLU(k), v and u; with theta, rotate q and k by LRPE.

    LRPE: x -> [x cos(t theta), x sin(t theta)], the angles in float32. A fused kernel on CUDA, plain PyTorch elsewhere
    and while a program is traced; `use_kernels` chooses. Differentiable in projected and theta.

    Args:
        projected: [B, T, 4 d] float32, float16, bfloat16 or float64, parts in the order q, k, v, u; d = H D.
        heads: H.
        theta: [H, 1, D] float32 (float64 beside float64), or None for no LRPE.
        positions: [B, T] int64, if theta is given.

    Returns:
        query and key [B, T, H, D], or [B, T, H, 2 D] with theta; value [B, T, H, D] and gate [B, T, d], both views.
    """
    head_dim = projected.shape[-1] // (4 * heads)
    if fused(projected) and head_dim <= MAX_HEAD_DIM and (theta is None or theta.dtype == torch.float32):
        if unwatched(projected) if theta is None else unwatched(projected, theta):
            query, key = _triton().split_heads_triton(projected, heads, theta, positions)
            return query, key, *_value_and_gate(projected, heads)
        result: Heads = _SplitHeads.apply(projected, theta, positions, heads)  # type: ignore[no-untyped-call]
        return result
    return split_heads_pytorch(projected, heads, theta, positions)


def split_heads_pytorch(projected: Tensor, heads: int, theta: Tensor | None, positions: Tensor | None) -> Heads:
    """Compute `split_heads` by PyTorch's own ops."""
    q, k, v, gate = projected.chunk(4, dim=-1)
    # [B, T, d] -> [B, T, H, D]
    query = torch.unflatten(F.silu(q), -1, (heads, -1))
    key = torch.unflatten(F.silu(k), -1, (heads, -1))
    value = torch.unflatten(v, -1, (heads, -1))
    if theta is not None and positions is not None:
        query, key = rotate(query, theta, positions), rotate(key, theta, positions)
    return query, key, value, gate


def rotate(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """LRPE by PyTorch's own ops: x [B, T, H, D], theta [H, 1, D], positions [B, T] -> [B, T, H, 2 D]."""
    # [B, T, 1, 1] * [H, D] -> [B, T, H, D]
    angles = torch.unflatten(positions.to(theta.dtype), 1, (-1, 1, 1)) * theta.squeeze(1)
    wide = x.to(angles.dtype)
    return torch.cat((wide * angles.cos(), wide * angles.sin()), dim=-1).to(x.dtype)


def split_heads_backward_pytorch(
    grads: Heads, projected: Tensor, heads: int, theta: Tensor | None, positions: Tensor | None, learn: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `split_heads` by PyTorch's own ops: of projected and, if `learn`, of theta."""
    wide = accumulator_dtype(projected.dtype)
    parts = []
    grad_theta = projected.new_empty((0, 1, 0) if theta is None or not learn else theta.shape, dtype=wide).zero_()
    for x, grad in zip(projected.chunk(4, dim=-1)[:2], grads[:2], strict=True):
        dy, x = grad.to(wide), x.to(wide)  # noqa: PLW2901
        if theta is not None and positions is not None:
            t = torch.unflatten(positions.to(wide), 1, (-1, 1, 1))
            angles = t * theta.squeeze(1)
            dcos, dsin = dy.chunk(2, dim=-1)
            dy = dcos * angles.cos() + dsin * angles.sin()
            if learn:
                silu = torch.unflatten(F.silu(x), -1, (heads, -1))
                dangle = silu * (dsin * angles.cos() - dcos * angles.sin())
                grad_theta += (t * dangle).sum((0, 1)).unsqueeze(1)
        sigmoid = torch.sigmoid(x)
        parts.append(dy.flatten(2) * sigmoid * (1 + x * (1 - sigmoid)))
    return torch.cat((*parts, grads[2].flatten(2), grads[3]), dim=-1).to(projected.dtype), grad_theta


def _split_heads(
    projected: Tensor, heads: int, theta: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    if runs_triton(projected):
        return _triton().split_heads_triton(projected, heads, theta, positions)  # type: ignore[no-any-return]
    query, key, _, _ = split_heads_pytorch(projected, heads, theta, positions)
    return query.contiguous(), key.contiguous()


def _value_and_gate(projected: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    B, T, width = projected.shape
    d = width // 4
    value = projected.narrow(-1, 2 * d, d).view(B, T, heads, d // heads)
    return value, projected.narrow(-1, 3 * d, d)


# Triton is imported when it is first wanted.
@cache
def _triton() -> Any:
    return import_module("tnllm_export.kernels.layer.triton_kernels.heads")


@torch.library.custom_op(f"{NAMESPACE}::split_heads", mutates_args=())
def split_heads_op(
    projected: Tensor, heads: int, theta: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute query and key of `split_heads`, contiguous; `split_heads` adds the views and the gradient."""
    return _split_heads(projected, heads, theta, positions)


@split_heads_op.register_fake
def _(projected: Tensor, heads: int, theta: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, width = projected.shape
    D = width // (4 * heads) * (1 if theta is None else 2)
    return projected.new_empty(B, T, heads, D), projected.new_empty(B, T, heads, D)


@torch.library.custom_op(f"{NAMESPACE}::split_heads_backward", mutates_args=())
def split_heads_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_gate: Tensor,
    projected: Tensor,
    heads: int,
    theta: Tensor | None,
    positions: Tensor | None,
    learn: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `split_heads`: of projected and, if `learn`, of theta [H, 1, D]; else that one is empty."""
    grads = (grad_query, grad_key, grad_value, grad_gate)
    if runs_triton(projected, *grads):
        return _triton().split_heads_backward_triton(  # type: ignore[no-any-return]
            grads, projected, heads, theta, positions, learn
        )
    return split_heads_backward_pytorch(grads, projected, heads, theta, positions, learn)


@split_heads_backward.register_fake
def _(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_gate: Tensor,
    projected: Tensor,
    heads: int,
    theta: Tensor | None,
    positions: Tensor | None,
    learn: bool,
) -> tuple[Tensor, Tensor]:
    grad_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    if theta is None or not learn:
        return grad_projected, projected.new_empty(0, 1, 0, dtype=torch.float32)
    return grad_projected, torch.empty_like(theta, memory_format=torch.contiguous_format)


class _SplitHeads(torch.autograd.Function):
    """`split_heads` by the ops above; not an op itself, because those may return no views of inputs, as v and u are."""

    @staticmethod
    def forward(projected: Tensor, theta: Tensor | None, positions: Tensor | None, heads: int) -> Heads:
        return *split_heads_op(projected, heads, theta, positions), *_value_and_gate(projected, heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Heads) -> None:
        projected, theta, positions, ctx.heads = inputs
        ctx.save_for_backward(projected, theta, positions)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        projected, theta, positions = ctx.saved_tensors
        learn = theta is not None and ctx.needs_input_grad[1]
        grad_projected, grad_theta = split_heads_backward(*grads, projected, ctx.heads, theta, positions, learn)
        return grad_projected, grad_theta if learn else None, None, None
