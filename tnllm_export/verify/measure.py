"""The error measures, in float64. Whatever is not finite gives NaN or infinity, never a small number."""

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Return ‖found - expected‖ / ‖expected‖ of each row: [N, ...] -> [N]. Of two zero rows it is 0."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    error = torch.linalg.vector_norm(found - expected, dim=1)
    size = torch.linalg.vector_norm(expected, dim=1)
    return torch.where((error == 0) & (size == 0), torch.zeros_like(error), error / size)


def max_abs_error(found: Tensor, expected: Tensor) -> Tensor:
    """Return max |found - expected| of each row: [N, ...] -> [N]."""
    # amax propagates NaN
    return (found.double() - expected.double()).abs().flatten(1).amax(dim=1)


def kl_divergence(found: Tensor, expected: Tensor) -> Tensor:
    """Return KL(softmax(expected) ‖ softmax(found)) in nats of each row: logits [N, vocab] -> [N]."""
    log_p, log_q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    # Rounding can make a divergence of almost nothing slightly negative.
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def top_gap(logits: Tensor) -> Tensor:
    """Return how far the second largest logit is below the largest: [N, vocab] -> [N]."""
    best = logits.double().topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def root_mean_square(x: Tensor) -> Tensor:
    """Return the root mean square of each row: [N, vocab] -> [N]."""
    return x.double().square().mean(-1).sqrt()
