"""What attention is measured on: shapes, inputs, the bytes that must move, and the float64 reference."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.lightning_attention import lightning_attention
from tnllm_export.models.decay import slope_rates

LAYERS = 30
"""Of the 7B model, whose decay rates are used."""

MIDDLE_LAYER = 15


@dataclass(frozen=True)
class Shape:
    """Batch, heads, tokens; K and V of one head; valid tokens of each row where they differ."""

    batch: int
    heads: int
    tokens: int
    key_dim: int = 128
    value_dim: int = 128
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        wide = f", K {self.key_dim}" if self.key_dim != self.value_dim else ""
        return f"{self.batch}, {self.heads}, {self.tokens}{wide}{', ragged' if self.lengths else ''}"

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Valid tokens of each row."""
        return self.lengths or (self.tokens,) * self.batch

    def forward_bytes(self, element_size: int = 2) -> int:
        """Bytes of q, k, v read once (valid tokens) and o written once (every token: padding gives 0)."""
        read = sum(self.row_lengths) * (2 * self.key_dim + self.value_dim)
        return element_size * self.heads * (read + self.batch * self.tokens * self.value_dim)

    def backward_bytes(self, element_size: int = 2) -> int:
        """Bytes of q, k, v and do read once, and of dq, dk, dv written once."""
        per_token = 2 * self.key_dim + self.value_dim
        valid = sum(self.row_lengths)
        written = self.batch * self.tokens * per_token
        return element_size * self.heads * (valid * (per_token + self.value_dim) + written)


SHAPES = (
    Shape(1, 32, 1024),
    Shape(1, 32, 2048),
    Shape(1, 32, 4096),
    Shape(1, 32, 8192),
    Shape(1, 32, 16384),
    Shape(1, 32, 65536),
    Shape(4, 32, 8192),
    Shape(8, 16, 4096),
    Shape(1, 32, 16384, key_dim=256),
    Shape(8, 32, 4096, lengths=(4096, 3583, 3001, 2048, 1999, 1023, 511, 77)),
)

PARITY_SHAPES = (
    Shape(1, 32, 4096),
    Shape(2, 8, 1031, key_dim=256, lengths=(1031, 517)),
)


ERROR_LIMITS = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 5e-3}
"""Relative errors against float64 that ours stays below, by dtype."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of the chunk op and the gradients that its results get."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    slope_rate: Tensor
    past_state: Tensor
    lengths: Tensor
    grad_output: Tensor
    grad_state: Tensor

    @property
    def bytes(self) -> int:
        """Of queries, keys, values and the output's gradient."""
        return sum(x.nbytes for x in (self.query, self.key, self.value, self.grad_output))


@dataclass(frozen=True)
class Results:
    """Output, state and gradients, those that a form gives; padding of the output and of gradients is 0."""

    output: Tensor
    state: Tensor | None
    query_grad: Tensor
    key_grad: Tensor
    value_grad: Tensor
    past_grad: Tensor | None = None

    def errors(self, reference: "Results") -> dict[str, float]:
        """Relative errors ‖x − ref‖ / ‖ref‖, by name."""
        return {
            name: relative_error(found, getattr(reference, name)) for name, found in vars(self).items()
            if found is not None
        }  # fmt: skip


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: str = "cuda",
    *,
    layer: int = MIDDLE_LAYER,
    continued: bool = False,
    seed: int = 0,
) -> Inputs:
    """Draw inputs as the model has them: SiLU on queries and keys, the released decay rates of one layer.

    Args:
        shape: Their shape.
        dtype: Of the activations.
        device: Where they lie.
        layer: Whose decay rates.
        continued: Whether there is a past state, and a gradient of the present one; else both are zero.
        seed: Of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    B, H, T, K, V = shape.batch, shape.heads, shape.tokens, shape.key_dim, shape.value_dim
    state = (lambda: draw(B, H, K, V)) if continued else (lambda: torch.zeros(B, H, K, V, device=device))
    return Inputs(
        shape=shape,
        query=F.silu(draw(B, T, H, K)).to(dtype),
        key=F.silu(draw(B, T, H, K)).to(dtype),
        value=draw(B, T, H, V).to(dtype),
        slope_rate=slope_rates("release", layer, LAYERS, H).to(device),
        past_state=state(),
        lengths=torch.tensor(shape.row_lengths, dtype=torch.int32, device=device),
        grad_output=draw(B, T, H, V).to(dtype),
        grad_state=state(),
    )


def run_op(inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    """Compute the chunk op's results, in another dtype if one is given; which kernels, `use_kernels` says."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cast = [x.to(dtype or x.dtype) for x in (inputs.query, inputs.key, inputs.value)]
    leaves = [x.detach().requires_grad_() for x in (*cast, inputs.past_state.to(wide))]
    output, state = lightning_attention(*leaves[:3], inputs.slope_rate.to(wide), leaves[3], inputs.lengths)
    grads = (inputs.grad_output.to(output.dtype), inputs.grad_state.to(wide))
    query_grad, key_grad, value_grad, past_grad = torch.autograd.grad((output, state), leaves, grads)
    return Results(output.detach(), state.detach(), query_grad, key_grad, value_grad, past_grad)


def reference_results(inputs: Inputs) -> Results:
    """Compute results in float64 by the blocked PyTorch form, which tests compare with the recurrence."""
    with use_kernels("pytorch"):
        return run_op(inputs, torch.float64)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """‖x − ref‖ / ‖ref‖ in float64."""
    difference = found.to(torch.float64) - reference
    return float(difference.norm() / reference.norm())


def without_padding(x: Tensor, shape: Shape) -> Tensor:
    """Set what stands at padded tokens of x [B, T, H, D] to 0."""
    if shape.lengths is None:
        return x
    valid = torch.arange(shape.tokens, device=x.device) < torch.tensor(shape.lengths, device=x.device)[:, None]
    return torch.where(valid[:, :, None, None], x, 0)
