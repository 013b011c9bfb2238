"""What is done to whole rows: a token's row of the embedding; the norms in front of a matrix product."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from tnllm_export.kernels.decode.overlap import launch, previous_is_done
from tnllm_export.kernels.layer.norm import EPSILON

_EPSILON = tl.constexpr(EPSILON)

_EMBED_BLOCK = 1024
_ROW_WARPS = 8


@triton.jit
def embed_kernel(
    p_ids,
    p_table,
    p_output,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write SCALE times rows of the table, [B, D]."""
    previous_is_done(OVERLAP)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    i_b = tl.program_id(0) // BLOCKS
    i_d = (tl.program_id(0) % BLOCKS) * BD + tl.arange(0, BD)
    row = tl.load(p_ids + i_b).to(tl.int64)
    b_x = tl.load(p_table + row * D + i_d, mask=i_d < D).to(tl.float32) * SCALE
    tl.store(p_output + i_b * D + i_d, b_x.to(p_output.dtype.element_ty), mask=i_d < D)


@triton.jit
def normalise_kernel(
    p_input,
    p_other,
    p_output,
    D: tl.constexpr,
    GATE: tl.constexpr,
    BD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write the norm of the input's row or, with GATE, the input's row times the norm of the other's; [B, D]."""
    i_d = tl.arange(0, BD)
    to = tl.program_id(0) * D + i_d
    previous_is_done(OVERLAP)
    b_x = tl.load(p_input + to, mask=i_d < D, other=0.0).to(tl.float32)
    if GATE:
        b_o = tl.load(p_other + to, mask=i_d < D, other=0.0).to(tl.float32)
        b_x *= b_o * tl.rsqrt(tl.sum(b_o * b_o, axis=0) / D + _EPSILON)
    else:
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + _EPSILON)
    tl.store(p_output + to, b_x.to(p_output.dtype.element_ty), mask=i_d < D)


def embed(input_ids: Tensor, table: Tensor, scale: float, output: Tensor, *, overlap: bool = True) -> None:
    """Write scale table[ids] for input_ids [B, 1] int64, contiguous, into output [B, d].

    The first kernel of a token: it waits for all work before it, whatever that is.
    """
    d = table.shape[1]
    block = min(_EMBED_BLOCK, triton.next_power_of_2(d))
    programs = input_ids.shape[0] * -(-d // block)
    launch(embed_kernel, programs, (input_ids, table, output), (d, float(scale), block), 4, overlap, first=True)


def normalise(x: Tensor, output: Tensor, *, other: Tensor | None = None, overlap: bool = True) -> None:
    """Write N(x) or, with other, x ⊙ N(other) into output; all [B, d], contiguous."""
    B, d = x.shape
    constants = (d, other is not None, triton.next_power_of_2(d))
    launch(normalise_kernel, B, (x, x if other is None else other, output), constants, _ROW_WARPS, overlap)
