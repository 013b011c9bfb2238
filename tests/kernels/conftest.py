"""Random inputs of the two ops: ragged lengths, non-zero past states, K and V apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tnllm_export.kernels.contract import accumulator_dtype

ChunkInputs = Callable[..., list[Tensor]]


@pytest.fixture
def chunk_inputs() -> ChunkInputs:
    """Draw the chunk op's inputs, query to lengths; the decay goes from almost none to strong."""

    def draw(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.randint(0, T + 1, (B,), generator=generator, dtype=torch.int32)
        lengths[0] = T
        wide = accumulator_dtype(dtype)
        return [
            (normal(B, T, H, K) / K**0.5).to(dtype),
            (normal(B, T, H, K) / K**0.5).to(dtype),
            normal(B, T, H, V).to(dtype),
            torch.logspace(-4, 0.5, H, dtype=wide),
            normal(B, H, K, V).to(wide),
            lengths,
        ]

    return draw


@pytest.fixture
def step_inputs(chunk_inputs: ChunkInputs) -> ChunkInputs:
    """Draw the decode step's inputs."""

    def draw(B: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        query, key, value, slope_rate, past_state, _ = chunk_inputs(B, 1, H, K, V, dtype, seed)
        return [query[:, 0], key[:, 0], value[:, 0], slope_rate, past_state]

    return draw
