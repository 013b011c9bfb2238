"""Backward of a product in Triton: both gradients from one pass, so that the incoming one is read once."""

# Triton code has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnllm_export.kernels.layer.triton_kernels.rows import Tile

BACKWARD = Tile(elements=2048, warps=4)


def glu_product_backward_triton(grad: Tensor, a: Tensor, b: Tensor, tile: Tile = BACKWARD) -> tuple[Tensor, Tensor]:
    """Gradients of a and b, contiguous."""
    da, db = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    size = a.numel()
    if size:
        with torch.cuda.device_of(a):
            backward_kernel[(triton.cdiv(size, tile.elements),)](
                *(x.contiguous() for x in (grad, a, b)), da, db, size, BLOCK=tile.elements, num_warps=tile.warps
            )
    return da, db


@triton.jit
def backward_kernel(dg_ptr, a_ptr, b_ptr, da_ptr, db_ptr, size, BLOCK: tl.constexpr):
    """Write da = dg b and db = dg a; all contiguous, `size` elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    b_dg = tl.load(dg_ptr + i, mask=mask).to(tl.float32)
    b_a = tl.load(a_ptr + i, mask=mask).to(tl.float32)
    b_b = tl.load(b_ptr + i, mask=mask).to(tl.float32)
    tl.store(da_ptr + i, (b_dg * b_b).to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(db_ptr + i, (b_dg * b_a).to(db_ptr.dtype.element_ty), mask=mask)
