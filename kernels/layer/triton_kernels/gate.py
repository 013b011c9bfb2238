"""u ⊙ N(o) in Triton: N(o) is never written; the backward computes rstd and N(o) again and gives both gradients."""

# Triton code has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnllm_export.kernels.layer.triton_kernels.rows import Cut, Launch, as_rows, launch_for, row_offsets, start

FORWARD = {
    1024: Launch(rows=2, warps=4),
    2048: Launch(rows=1, warps=4),
    4096: Launch(rows=1, warps=8),
    8192: Launch(rows=1, warps=16),
    16384: Launch(rows=1, warps=32),
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


def gated_norm_triton(gate: Tensor, x: Tensor, epsilon: float, launch: Launch | None = None) -> Tensor:
    """Compute gate ⊙ N(x), [..., D] contiguous."""
    g = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if g.numel():
        u, o = as_rows(gate), as_rows(x)
        start(forward_kernel, _cut(o.shape, u.stride(), o.stride(), x.dtype, x.device, epsilon, launch), u, o, g)
    return g


@lru_cache(maxsize=1024)
def _cut(
    shape: torch.Size,
    gate_stride: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,  # for the key alone
    device: torch.device,
    epsilon: float,
    launch: Launch | None,
) -> Cut:
    outer, inner, D = shape
    launch = launch or launch_for(FORWARD, D)
    return launch.cut((outer * inner, inner, *gate_stride[:2], *stride[:2]), device, D, epsilon)


def gated_norm_backward_triton(
    grad: Tensor, gate: Tensor, x: Tensor, epsilon: float, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x, [..., D] contiguous."""
    du = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    do = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dg, u, o = as_rows(grad), as_rows(gate), as_rows(x)
    outer, inner, D = o.shape
    if do.numel():
        launch = launch or launch_for(BACKWARD, D)
        with torch.cuda.device_of(x):
            backward_kernel[launch.grid(outer * inner, x.device)](
                dg,
                u,
                o,
                du,
                do,
                outer * inner,
                inner,
                *dg.stride()[:2],
                *u.stride()[:2],
                *o.stride()[:2],
                **launch.constants(D, epsilon),
            )
    return du, do


@triton.jit(do_not_specialize=["R", "inner"])
def forward_kernel(
    u_ptr,
    o_ptr,
    g_ptr,
    R,
    inner,
    stride_uo,
    stride_ui,
    stride_oo,
    stride_oi,
    epsilon: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write g = u o rsqrt(mean(o²) + epsilon), g [R, D] contiguous; u and o [outer, inner, D], last dimension dense."""
    i_d = tl.arange(0, BD)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0), num_stages=STAGES):
        i_r = i_tile * BR + tl.arange(0, BR)
        # [BR, BD]
        mask = (i_r < R)[:, None] & (i_d < D)[None, :]
        p_o = o_ptr + row_offsets(i_r, inner, stride_oo, stride_oi)[:, None] + i_d[None, :]
        p_u = u_ptr + row_offsets(i_r, inner, stride_uo, stride_ui)[:, None] + i_d[None, :]
        b_o = tl.load(p_o, mask=mask, other=0.0).to(tl.float32)
        b_u = tl.load(p_u, mask=mask, other=0.0).to(tl.float32)
        # [BR]
        b_rstd = tl.rsqrt(tl.sum(b_o * b_o, axis=1) / D + epsilon)
        b_g = b_u * (b_o * b_rstd[:, None])
        tl.store(g_ptr + i_r.to(tl.int64)[:, None] * D + i_d[None, :], b_g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "inner"])
def backward_kernel(
    dg_ptr,
    u_ptr,
    o_ptr,
    du_ptr,
    do_ptr,
    R,
    inner,
    stride_dgo,
    stride_dgi,
    stride_uo,
    stride_ui,
    stride_oo,
    stride_oi,
    epsilon: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write du = dg N(o) and do = rstd (dn - o rstd² mean(dn o)) with dn = dg u; both [R, D] contiguous."""
    i_d = tl.arange(0, BD)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0), num_stages=STAGES):
        i_r = i_tile * BR + tl.arange(0, BR)
        # [BR, BD]
        mask = (i_r < R)[:, None] & (i_d < D)[None, :]
        p_o = o_ptr + row_offsets(i_r, inner, stride_oo, stride_oi)[:, None] + i_d[None, :]
        p_u = u_ptr + row_offsets(i_r, inner, stride_uo, stride_ui)[:, None] + i_d[None, :]
        p_dg = dg_ptr + row_offsets(i_r, inner, stride_dgo, stride_dgi)[:, None] + i_d[None, :]
        b_o = tl.load(p_o, mask=mask, other=0.0).to(tl.float32)
        b_u = tl.load(p_u, mask=mask, other=0.0).to(tl.float32)
        b_dg = tl.load(p_dg, mask=mask, other=0.0).to(tl.float32)
        b_dn = b_dg * b_u
        # [BR]
        b_rstd = tl.rsqrt(tl.sum(b_o * b_o, axis=1) / D + epsilon)
        b_c = tl.sum(b_dn * b_o, axis=1) / D * b_rstd * b_rstd
        b_do = (b_dn - b_o * b_c[:, None]) * b_rstd[:, None]
        b_du = b_dg * (b_o * b_rstd[:, None])
        offsets = i_r.to(tl.int64)[:, None] * D + i_d[None, :]
        tl.store(du_ptr + offsets, b_du.to(du_ptr.dtype.element_ty), mask=mask)
        tl.store(do_ptr + offsets, b_do.to(do_ptr.dtype.element_ty), mask=mask)
