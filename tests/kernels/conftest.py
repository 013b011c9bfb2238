"""Random inputs of the two ops: ragged lengths, non-zero past states, K and V apart. How scripts compile kernels."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def lines_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Run a script beside the test, which prints one JSON object a line, where kernels are not interpreted."""

    def run(script: Path) -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
