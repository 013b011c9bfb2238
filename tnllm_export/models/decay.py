"""Decay rates of the heads: lambda = exp(-slope_rate)."""

import math

import torch
from torch import Tensor

from tnllm_export.models.config import Decay


def alibi_slopes(heads: int) -> list[float]:
    """Return ALiBi's slopes, m_h = 2^(-8 (h + 1) / H) for H a power of two (Press et al., arXiv 2108.12409).

    For other H the slopes of the next lower power of two are followed by every other slope of the next higher one.
    """
    exponent = math.log2(heads)
    if exponent.is_integer():
        start = 2 ** (-(2 ** -(exponent - 3)))
        return [start ** (h + 1) for h in range(heads)]
    lower = 2 ** math.floor(exponent)
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[0::2][: heads - lower]


def slope_rates(decay: Decay, layer: int, layers: int, heads: int) -> Tensor:
    """Return one layer's decay rates s_h >= 0, [H] float32.

    "release": s_h = m_h (1 - l / (L - 1) + 1e-5), as the released checkpoints compute it, in float32.
    "paper": s_h = (8 h / H) (1 - l / L), arXiv 2307.14995, section 3.1.
    """
    if decay == "paper":
        return torch.tensor([8 * h / heads * (1 - layer / layers) for h in range(heads)], dtype=torch.float32)
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float32)
    # The release divides by L - 1 and so has no single-layer model; one layer is then the first one.
    return slopes * (1 - layer / max(layers - 1, 1) + 1e-5)
