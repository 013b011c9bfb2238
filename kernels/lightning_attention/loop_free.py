"""The chunk op in PyTorch without a loop over chunks, for compilers that see symbolic sizes.

`blocked.py` walks the chunks one after the other, which a tracer with a symbolic T can't follow. Here the states before
each chunk are a decayed prefix sum of M = N + 1 items, the past state and the N chunks' updates: a mask sums inside
groups of GROUP chunks, another one over the groups. The second mask has (T / 512)² entries per head.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tnllm_export.kernels.lightning_attention.blocked import _chunked, _decays, _unchunked, _valid

GROUP = 8
"""Chunks per group."""


def lightning_attention_loop_free(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the chunk op for T of at least 1. Args and results are those of `lightning_attention`."""
    T = query.shape[1]
    q, k, v = _chunked(query, None), _chunked(key, lengths), _chunked(value, lengths)
    N, C = q.shape[2:4]
    counts = lengths.clamp(max=T)
    decays = _decays(slope_rate, counts, N)
    chunk_rate = slope_rate[:, None, None] * C

    # Items, padded with zeros to A groups; at least one zero follows the last update.  [B, H, A, G, K V]
    updates = (decays.key * k).mT @ v
    items = torch.cat((past_state[:, :, None].to(q.dtype), updates), dim=2).flatten(3)
    items = F.pad(items, (0, 0, 0, ((N + 1) // GROUP + 1) * GROUP - (N + 1)))
    grouped = torch.unflatten(items, 2, (-1, GROUP))

    # Sums inside groups, then of whole groups before each group.
    local = _decay_mask(GROUP, 0, chunk_rate)[:, None] @ grouped
    before = _decay_mask(grouped.shape[2], 1, chunk_rate * GROUP) @ local[:, :, :, -1]
    since = torch.arange(1, GROUP + 1, device=slope_rate.device)
    from_before = torch.exp(-chunk_rate * since[:, None])[:, None]
    # The state before each chunk, [B, H, A G, K V]
    sums = (local + from_before * before[:, :, :, None]).flatten(2, 3)

    states = torch.unflatten(sums[:, :, :N], 3, (q.shape[4], v.shape[4]))
    scores = (q @ k.mT) * decays.intra[:, None]
    output = _unchunked(scores @ v + decays.query * (q @ states), T)
    output = torch.where(_valid(lengths, T)[:, :, None, None], output, 0).to(query.dtype)

    # After the last valid token: whole chunks, then what is left of one.  [B, H, K V]
    whole = (counts // C).to(torch.int64)
    index = whole[:, None, None, None].expand(-1, past_state.shape[1], 1, items.shape[3])
    rest = (counts - whole * C)[:, None, None]
    final = torch.exp(-slope_rate[:, None] * rest) * sums.gather(2, index).squeeze(2)
    final = final + items.gather(2, index + 1).squeeze(2)
    return output, torch.unflatten(final, 2, (q.shape[4], v.shape[4])).contiguous()


def _decay_mask(size: int, offset: int, rate: Tensor) -> Tensor:
    """exp(-rate (i - j - offset)) where that distance is not negative, else 0: [H, size, size] for rate [H, 1, 1]."""
    place = torch.arange(size, device=rate.device)
    apart = place[:, None] - place - offset
    return torch.where(apart >= 0, torch.exp(-rate * apart.clamp(min=0)), 0)
