"""The blocked form in PyTorch: matrix products inside chunks, a short scan over chunk states (arXiv 2401.04658).

Within a chunk, rows i and j count from 0, M[i, j] = lambda^(i-j) for i >= j, and c is the number of valid tokens:

    O = (Q Kᵀ ⊙ M) V + diag(lambda^(i+1)) Q S
    S <- lambda^c S + (diag(lambda^(c-1-j)) K)ᵀ V

No factor exceeds 1, so nothing overflows at any length. Memory is linear in T.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tnllm_export.kernels.contract import CHUNK_SIZE, accumulator_dtype


@dataclass(frozen=True)
class _Decays:
    """Decay factors of a ragged batch cut into N chunks of C tokens; each is at most 1."""

    intra: Tensor  # M, [H, C, C]
    query: Tensor  # lambda^(i+1), [H, 1, C, 1]
    key: Tensor  # lambda^(c-1-j), 0 for padding, [B, H, N, C, 1]
    chunk: Tensor  # lambda^c, [B, H, N, 1, 1]
    counts: Tensor  # c, [B, N]


def lightning_attention_blocked(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the chunk op. Args and results are those of `lightning_attention`."""
    T = query.shape[1]
    if T == 0:
        return torch.empty_like(value, memory_format=torch.contiguous_format), past_state.contiguous().clone()
    q, k, v = _chunked(query, None), _chunked(key, lengths), _chunked(value, lengths)
    decays = _decays(slope_rate, lengths.clamp(max=T), q.shape[2])
    states, present_state = _scan_states(k, v, decays, past_state)
    scores = (q @ k.mT) * decays.intra[:, None]
    output = _unchunked(scores @ v + decays.query * (q @ states), T)
    valid = _valid(lengths, T)[:, :, None, None]
    return torch.where(valid, output, 0).to(query.dtype), present_state


def lightning_attention_blocked_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key, value, slope_rate and past_state; chunk states are computed anew.

    Args:
        grad_output: [B, T, H, V], of the output.
        grad_state: [B, H, K, V] float32, of present_state.
        query, key, value, slope_rate, past_state, lengths: The chunk op's inputs.
    """
    T = query.shape[1]
    if T == 0:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        return dq, dk, dv, torch.zeros_like(slope_rate), grad_state.contiguous().clone()
    q, k, v, do = (_chunked(x, lengths) for x in (query, key, value, grad_output))
    N, C = q.shape[2:4]
    decays = _decays(slope_rate, lengths.clamp(max=T), N)
    M = decays.intra[:, None]
    states, present_state = _scan_states(k, v, decays, past_state)

    # Reverse scan: the gradient of the state after each chunk, [B, H, N, K, V].
    updates = (decays.query * q).mT @ do
    after = []
    d_state = grad_state.to(q.dtype)
    for n in reversed(range(N)):
        after.append(d_state)
        d_state = decays.chunk[:, :, n] * d_state + updates[:, :, n]
    d_after = torch.stack(after[::-1], dim=2)

    d_scores = (do @ v.mT) * M
    dq = d_scores @ k + decays.query * (do @ states.mT)
    dk = d_scores.mT @ q + decays.key * (v @ d_after.mT)
    dv = ((q @ k.mT) * M).mT @ do + decays.key * (k @ d_after)

    # Every factor is exp(-s (b_i - b_j)) with b = i + 1 for a query, j + 1 for a key, 0 before the chunk and c after
    # it. So dL/ds = sum over chunks of  -b q·dq + b k·dk - c <S, dS>, which needs no state per token.
    b = torch.arange(1, C + 1, dtype=q.dtype, device=q.device)
    states_after = torch.cat((states[:, :, 1:], present_state[:, :, None].to(q.dtype)), dim=2)
    # [B, H, N]
    leaving = (states_after * d_after).sum((-2, -1)) * decays.counts[:, None].to(q.dtype)
    d_slope = (((k * dk).sum(-1) - (q * dq).sum(-1)) @ b - leaving).sum((0, 2))

    return (
        _unchunked(dq, T).to(query.dtype),
        _unchunked(dk, T).to(key.dtype),
        _unchunked(dv, T).to(value.dtype),
        d_slope.to(slope_rate.dtype),
        d_state.to(past_state.dtype).contiguous(),
    )


def _valid(lengths: Tensor, T: int) -> Tensor:
    """Which tokens are no padding, [B, T]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def _chunked(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Cut [B, T, H, D] into chunks [B, H, N, C, D] in the accumulator's dtype; padding, where lengths say so, is 0."""
    T = x.shape[1]
    if lengths is not None:
        x = torch.where(_valid(lengths, T)[:, :, None, None], x, 0)
    # Not -T % CHUNK_SIZE: compiled to C++ for a symbolic T, a remainder keeps the sign.
    x = F.pad(x, (0, 0, 0, 0, 0, (T + CHUNK_SIZE - 1) // CHUNK_SIZE * CHUNK_SIZE - T))
    return torch.unflatten(x, 1, (-1, CHUNK_SIZE)).permute(0, 3, 1, 2, 4).to(accumulator_dtype(x.dtype))


def _unchunked(x: Tensor, T: int) -> Tensor:
    """Undo `_chunked`: [B, H, N, C, D] -> [B, T, H, D], contiguous."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].contiguous()


def _decays(slope_rate: Tensor, lengths: Tensor, N: int) -> _Decays:
    C = CHUNK_SIZE
    row = torch.arange(C, device=slope_rate.device)
    distance = row[:, None] - row
    s = slope_rate[:, None, None]
    intra = torch.where(distance >= 0, torch.exp(-s * distance.clamp(min=0)), 0)
    # Valid tokens of each chunk, [B, N]
    counts = (lengths[:, None] - C * torch.arange(N, device=lengths.device)).clamp(0, C)
    left = counts[:, :, None] - 1 - row
    # [B, 1, N, C] * [H, 1, 1] -> [B, H, N, C]
    key = torch.where(left[:, None] >= 0, torch.exp(-s * left[:, None].clamp(min=0)), 0)
    return _Decays(
        intra=intra,
        query=torch.exp(-s * (row + 1))[..., None],
        key=key[..., None],
        chunk=torch.exp(-s[:, 0] * counts[:, None])[..., None, None],
        counts=counts,
    )


def _scan_states(k: Tensor, v: Tensor, decays: _Decays, past_state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk, [B, H, N, K, V], and the one after the last."""
    updates = (decays.key * k).mT @ v
    state = past_state
    states = []
    for n in range(updates.shape[2]):
        states.append(state)
        state = decays.chunk[:, :, n] * state + updates[:, :, n]
    return torch.stack(states, dim=2), state.contiguous()
