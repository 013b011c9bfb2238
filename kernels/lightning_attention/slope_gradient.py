"""The gradient of slope_rate, in PyTorch, in pieces: memory does not grow with T but for one state per piece.

No kernel computes it: in the released models slope_rate is a buffer. The blocked backward gives it for one piece from
the states around that piece.
"""

import torch
from torch import Tensor

from tnllm_export.kernels.contract import CHUNK_SIZE
from tnllm_export.kernels.lightning_attention.blocked import (
    lightning_attention_blocked,
    lightning_attention_blocked_backward,
)

PIECE = 16 * CHUNK_SIZE
"""Tokens per piece."""


def slope_gradient_in_pieces(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Return dL/ds, [H]. Args are those of `lightning_attention_blocked_backward`."""
    T = query.shape[1]
    pieces = [slice(start, min(start + PIECE, T)) for start in range(0, T, PIECE)]
    remaining = [(lengths - piece.start).clamp(min=0).to(torch.int32) for piece in pieces]
    states = []
    state = past_state
    for piece, left in zip(pieces, remaining, strict=True):
        states.append(state)
        _, state = lightning_attention_blocked(query[:, piece], key[:, piece], value[:, piece], slope_rate, state, left)
    total = torch.zeros_like(slope_rate, memory_format=torch.contiguous_format)
    d_state = grad_state
    for piece, left, state in zip(reversed(pieces), reversed(remaining), reversed(states), strict=True):
        *_, d_slope, d_state = lightning_attention_blocked_backward(
            grad_output[:, piece], d_state, query[:, piece], key[:, piece], value[:, piece], slope_rate, state, left
        )
        total += d_slope
    return total
