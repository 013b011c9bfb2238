"""Random operands of a linear map, small and odd, on poisoned outputs; Triton, interpreted where there is no GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tnllm_export.kernels.dispatch import use_kernels


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


@dataclass
class Operands:
    """Of one map: arguments of `linear` and `linear_pytorch`, and all tensors that they write."""

    x: Tensor
    weight: Tensor
    output: Tensor
    options: dict[str, Any]

    @property
    def written(self) -> list[Tensor]:
        heads = self.options.get("heads")
        return [self.output] if heads is None else [self.output, heads.key, heads.value, heads.gate]

    def copy(self, dtype: torch.dtype | None = None) -> "Operands":
        """The same numbers elsewhere, floating-point ones in `dtype` (but theta, which stays wide enough)."""

        def one(tensor: Tensor) -> Tensor:
            return tensor.to(dtype or tensor.dtype, copy=True)

        options = {
            name: one(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.options.items()
        }
        heads = options.get("heads")
        if heads is not None:
            theta = heads.theta if heads.theta is None or dtype != torch.float64 else heads.theta.double()
            options["heads"] = replace(
                heads, key=one(heads.key), value=one(heads.value), gate=one(heads.gate), theta=theta
            )
        return Operands(one(self.x), one(self.weight), one(self.output), options)


@pytest.fixture
def operands(device: torch.device) -> Callable[..., Operands]:
    """Draw a map's operands: `rows` of weights, or of each part for "heads"."""
    from tnllm_export.kernels.decode.linear import Heads

    def draw(
        before: str,
        after: str,
        batch: int,
        rows: int,
        columns: int,
        dtype: torch.dtype = torch.float32,
        *,
        heads: int = 1,
        rotated: bool = False,
        seed: int = 0,
    ) -> Operands:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        def poison(*shape: int) -> Tensor:
            return torch.full(shape, float("nan"), dtype=dtype, device=device)

        N = 4 * rows if after == "heads" else rows
        weight = normal(N, columns) / columns**0.5
        options: dict[str, Any] = {"before": before, "after": after}
        output = normal(batch, rows) if after == "residual" else poison(batch, rows)
        if before == "gate":
            options["other"] = 3 * normal(batch, columns)
        if after == "product":
            options["weight_2"] = normal(N, columns) / columns**0.5
        if after == "heads":
            D = rows // heads
            K = D * (2 if rotated else 1)
            theta = (10000 ** (-2 / rows * torch.arange(rows, dtype=torch.float32))).reshape(heads, 1, D).to(device)
            positions = torch.randint(0, 100_000, (batch,), generator=generator).to(device)
            output = poison(batch, heads, K)
            options["heads"] = Heads(
                heads,
                poison(batch, heads, K),
                poison(batch, heads, D),
                poison(batch, rows),
                theta if rotated else None,
            )
            options["positions"] = positions
        return Operands(2 * normal(batch, columns), weight, output, options)

    return draw
