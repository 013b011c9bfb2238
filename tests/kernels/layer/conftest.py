"""What the layer's ops are tried on: Triton (interpreted where there is no GPU), inputs in strange places, poison."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tnllm_export.kernels.dispatch import use_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Draw = Callable[..., Tensor]


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
def draw(device: torch.device) -> Draw:
    """Draw a tensor from N(0, 1), always the same for the same arguments, on the device that kernels are tried on."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return normal


@pytest.fixture
def tolerance(device: torch.device) -> dict[torch.dtype, float]:
    """Limits of the relative error, in norm, of a result that is rounded once.

    float32: sums of at most 16384 squares by a tree, an approximate rsqrt or exp (2 units in the last place each).
    The halves: their unit roundoff, 2^-11 and 2^-8, which no single rounding exceeds; Triton's interpreter cuts
    bfloat16 off instead of rounding it, 2^-7.
    """
    bfloat16 = 2.0**-8 if device.type == "cuda" else 2.0**-7
    return {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: bfloat16}


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Distance from the reference in units of its norm."""

    def measure(found: Tensor, reference: Tensor) -> float:
        assert found.shape == reference.shape
        assert reference.norm() > 0
        return ((found.double() - reference.double()).norm() / reference.double().norm()).item()

    return measure
