"""Triton kernels, interpreted where there is no GPU, on poisoned memory; the recurrence in float64 to compare with."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tnllm_export.kernels.dispatch import use_kernels

Measure = Callable[[Tensor, Tensor], float]


@pytest.fixture
def triton() -> Iterator[None]:
    """Run the ops in Triton; memory that a kernel should have written and has not holds NaN."""
    pytest.importorskip("triton")
    torch.use_deterministic_algorithms(True)
    try:
        with use_kernels("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def relative_error() -> Measure:
    """Distance from the reference in units of its norm."""

    def measure(found: Tensor, reference: Tensor) -> float:
        assert found.shape == reference.shape
        found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
        assert reference.norm() > 0
        return ((found - reference).norm() / reference.norm()).item()

    return measure


@pytest.fixture
def in_float64() -> Callable[[list[Tensor]], list[Tensor]]:
    """The same numbers, wide."""
    return lambda inputs: [tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in inputs]
