"""SRMSNorm in Triton: a row is read once, held in registers, and written once; the backward computes rstd again."""

# Triton code has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnllm_export.kernels.layer.triton_kernels.rows import Cut, Launch, as_rows, launch_for, row_offsets, start

FORWARD = {
    1024: Launch(rows=4, warps=4),
    2048: Launch(rows=2, warps=4),
    4096: Launch(rows=1, warps=4),
    8192: Launch(rows=1, warps=8),
    16384: Launch(rows=1, warps=16),
}
"""By the width's next power of two."""

BACKWARD = {
    1024: Launch(rows=2, warps=4),
    2048: Launch(rows=1, warps=4),
    4096: Launch(rows=1, warps=8),
    8192: Launch(rows=1, warps=16),
    16384: Launch(rows=1, warps=32),
}
"""By the width's next power of two."""


def srmsnorm_triton(x: Tensor, dtype: torch.dtype, epsilon: float, launch: Launch | None = None) -> Tensor:
    """Normalise x [..., D] into a contiguous tensor of `dtype`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel():
        rows = as_rows(x)
        start(forward_kernel, _cut(rows.shape, rows.stride(), x.dtype, dtype, x.device, epsilon, launch), rows, y)
    return y


@lru_cache(maxsize=1024)
def _cut(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,  # as the next, for the key alone
    result_dtype: torch.dtype,
    device: torch.device,
    epsilon: float,
    launch: Launch | None,
) -> Cut:
    outer, inner, D = shape
    launch = launch or launch_for(FORWARD, D)
    return launch.cut((outer * inner, inner, *stride[:2]), device, D, epsilon)


def srmsnorm_backward_triton(grad: Tensor, x: Tensor, epsilon: float, launch: Launch | None = None) -> Tensor:
    """Gradient of x [..., D] in x's dtype, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy_rows, x_rows = as_rows(grad), as_rows(x)
    outer, inner, D = x_rows.shape
    if dx.numel():
        launch = launch or launch_for(BACKWARD, D)
        with torch.cuda.device_of(x):
            backward_kernel[launch.grid(outer * inner, x.device)](
                dy_rows,
                x_rows,
                dx,
                outer * inner,
                inner,
                *dy_rows.stride()[:2],
                *x_rows.stride()[:2],
                **launch.constants(D, epsilon),
            )
    return dx


@triton.jit(do_not_specialize=["R", "inner"])
def forward_kernel(
    x_ptr,
    y_ptr,
    R,
    inner,
    stride_xo,
    stride_xi,
    epsilon: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write y = x rsqrt(mean(x²) + epsilon), y [R, D] contiguous; x [outer, inner, D] with a dense last dimension."""
    i_d = tl.arange(0, BD)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0), num_stages=STAGES):
        i_r = i_tile * BR + tl.arange(0, BR)
        # [BR, BD]
        mask = (i_r < R)[:, None] & (i_d < D)[None, :]
        p_x = x_ptr + row_offsets(i_r, inner, stride_xo, stride_xi)[:, None] + i_d[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        # [BR]
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + epsilon)
        b_y = b_x * b_rstd[:, None]
        tl.store(y_ptr + i_r.to(tl.int64)[:, None] * D + i_d[None, :], b_y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "inner"])
def backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    R,
    inner,
    stride_dyo,
    stride_dyi,
    stride_xo,
    stride_xi,
    epsilon: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write dx = rstd (dy - x rstd² mean(dy x)), dx [R, D] contiguous."""
    i_d = tl.arange(0, BD)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0), num_stages=STAGES):
        i_r = i_tile * BR + tl.arange(0, BR)
        # [BR, BD]
        mask = (i_r < R)[:, None] & (i_d < D)[None, :]
        p_x = x_ptr + row_offsets(i_r, inner, stride_xo, stride_xi)[:, None] + i_d[None, :]
        p_dy = dy_ptr + row_offsets(i_r, inner, stride_dyo, stride_dyi)[:, None] + i_d[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy, mask=mask, other=0.0).to(tl.float32)
        # [BR]
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + epsilon)
        b_c = tl.sum(b_dy * b_x, axis=1) / D * b_rstd * b_rstd
        b_dx = (b_dy - b_x * b_c[:, None]) * b_rstd[:, None]
        tl.store(dx_ptr + i_r.to(tl.int64)[:, None] * D + i_d[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=mask)
