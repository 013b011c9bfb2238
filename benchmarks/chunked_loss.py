"""Cross entropy of a large vocabulary over many tokens, some thousand tokens at a time, with its gradients.

Logits of 131,072 tokens and 64,000 words would be 34 GB in float32. Here those of one piece exist at a time, and the
gradients of hidden states and weight are made in the same pass, so that logits are computed once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

PIECE = 8192


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, compiled: bool = False
) -> Tensor:
    """Return the mean cross entropy of hidden [N, d] @ weight [V, d]ᵀ against targets [N].

    Products are in `dtype`, sums in float32. `compiled`: let torch.compile fuse what follows the product.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, dtype, compiled)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, compiled: bool
    ) -> Tensor:  # fmt: skip
        compute = _compiled_piece_loss() if compiled else piece_loss
        narrow = weight.to(dtype)
        hidden_grad = torch.empty_like(hidden, dtype=dtype)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], PIECE):
            piece = hidden[start : start + PIECE].to(dtype)
            part, logits_grad = compute(piece @ narrow.T, targets[start : start + PIECE])
            loss += part
            hidden_grad[start : start + PIECE] = logits_grad @ narrow
            weight_grad += logits_grad.T @ piece
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss / hidden.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scale = grad / hidden_grad.shape[0]
        return scale * hidden_grad.to(hidden_dtype), (scale * weight_grad).to(weight_dtype), None, None, None


def piece_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of one piece's losses, and its gradient in logits' dtype."""
    wide = logits.float()
    normaliser = wide.logsumexp(-1, keepdim=True)
    index = targets[:, None]
    loss = (normaliser - wide.gather(1, index)).sum()
    words = torch.arange(wide.shape[1], device=wide.device)
    gradient = (wide - normaliser).exp() - (words == index).float()
    return loss, gradient.to(logits.dtype)


@cache
def _compiled_piece_loss() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(piece_loss, dynamic=False)
