"""The linear maps of one token, with what stands before and after them."""

# mypy: allow-untyped-calls

from dataclasses import dataclass

import torch
from torch import Tensor

from tnllm_export.kernels.decode.matmul import matmul_kernel
from tnllm_export.kernels.decode.matvec import matvec_kernel
from tnllm_export.kernels.decode.overlap import launch
from tnllm_export.kernels.decode.plan import ACCESS_BYTES, Cut, Input, Matrix, Output, Vector, cut, token_block
from tnllm_export.kernels.decode.rows import normalise
from tnllm_export.kernels.lightning_attention.launch import processors


@dataclass(frozen=True)
class Heads:
    """Where the parts of the fused projection go, besides the query.

    Attributes:
        count: Number of heads H.
        key: [B, H, K], written; K = 2 D with theta.
        value: [B, H, D], written.
        gate: [B, d], written.
        theta: LRPE's angles per position, [H, 1, D] float32, or None.
    """

    count: int
    key: Tensor
    value: Tensor
    gate: Tensor
    theta: Tensor | None


class Scratch:
    """Memory that the matrix kernel needs beside its operands; one for all maps of a token.

    Attributes:
        normed: [B, widest] activations as the matrix product reads them.
        parts: Sums of programs that share the columns, float32.
        arrivals: How many of those have ended, int32, zero between maps.
    """

    def __init__(self, batch: int, maps: list[tuple[Output, int, int]], dtype: torch.dtype, device: torch.device):
        """Allocate for maps (output, rows, columns) of a batch."""
        parts, arrivals, widest = 1, 1, 1
        for output, rows, columns in maps:
            sizes = cut(output, batch, rows, columns, dtype.itemsize, processors(device))
            if isinstance(sizes, Matrix):
                widest = max(widest, columns)
                parts = max(parts, parts_size(sizes, output, rows, batch))
                arrivals = max(arrivals, -(-rows // sizes.rows))
        self.normed = torch.empty(batch * widest, dtype=dtype, device=device)
        self.parts = torch.empty(parts, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(arrivals, dtype=torch.int32, device=device)


def parts_size(sizes: Matrix, output: Output, rows: int, batch: int) -> int:
    """Return the elements of `Scratch.parts` that a map needs."""
    if sizes.split == 1:
        return 1
    tiles = -(-rows // sizes.rows)
    return sizes.split * (2 if output == "product" else 1) * tiles * sizes.rows * token_block(batch)


def linear(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    scratch: Scratch,
    *,
    before: Input = "plain",
    after: Output = "store",
    other: Tensor | None = None,
    weight_2: Tensor | None = None,
    heads: Heads | None = None,
    positions: Tensor | None = None,
    sizes: Cut | None = None,
    overlap: bool = True,
) -> None:
    """Compute after(before(x) weightᵀ) in float32 inside, rounding what is written.

    Args:
        x: [B, K] float32, float16 or bfloat16; all tensors are contiguous.
        weight: [N, K], same dtype.
        output: [B, N]; [B, N / 4], or twice as wide with theta, the query, for "heads".
        scratch: Made for this map among others.
        before: "norm" takes N(x), "gate" x ⊙ N(other).
        after: "residual" adds to the output, "product" multiplies by the same map with weight_2, "heads" takes the
            rows for q, k, v, u one after another, applies SiLU to q and k and rotates them.
        other: [B, K], for "gate".
        weight_2: [N, K], for "product".
        heads: For "heads".
        positions: [B] int64, what theta is multiplied by.
        sizes: Others than the plan's.
        overlap: Whether it may start before the previous kernel has ended; weights must not be that one's.
    """
    B, K = x.shape
    N = weight.shape[0]
    sizes = sizes or cut(after, B, N, K, x.dtype.itemsize, processors(x.device))
    # Pointers that a kernel does not follow are any tensor's.
    where = (output, output, output, output, output, output)
    rotated = False
    if heads is not None:
        rotated = heads.theta is not None
        theta = output if heads.theta is None else heads.theta
        where = (output, heads.key, heads.value, heads.gate, theta, output if positions is None else positions)
    count = 1 if heads is None else heads.count
    weights = (weight, weight if weight_2 is None else weight_2)
    if isinstance(sizes, Vector):
        access = ACCESS_BYTES // x.dtype.itemsize
        launch(
            matvec_kernel,
            -(-N // sizes.rows) * -(-B // sizes.tokens),
            (x, x if other is None else other, *weights, *where),
            (B, N, K, count, before, after, rotated, sizes.tokens, sizes.rows, sizes.columns, access),
            sizes.warps,
            overlap,
        )
        return
    if before != "plain":
        normed = scratch.normed[: B * K].view(B, K)
        normalise(x, normed, other=other if before == "gate" else None, overlap=overlap)
        x = normed
    launch(
        matmul_kernel,
        -(-N // sizes.rows) * sizes.split,
        (x, *weights, *where, scratch.parts, scratch.arrivals),
        (B, N, K, count, after, rotated, token_block(B), sizes.rows, sizes.columns, sizes.split, sizes.stages),
        sizes.warps,
        overlap,
    )
