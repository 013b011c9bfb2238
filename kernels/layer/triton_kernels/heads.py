"""SiLU and LRPE on q and k in Triton, straight from the fused projection's rows and, backward, straight into them.

A program takes BT tokens of one head. Sines and cosines are a Cody-Waite reduction and short polynomials (Cephes sinf
and cosf, error below 1e-7): the angles go up to 10⁵ and more, where the hardware's approximations are wrong and the
library's exact ones cost about as much time as the memory traffic.
"""

# Triton code has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnllm_export.kernels.layer.triton_kernels.rows import Cut, Tile, as_rows, row_offsets, start

FORWARD = {False: Tile(elements=4096, warps=4), True: Tile(elements=2048, warps=8)}
"""By whether LRPE rotates; elements of q: tokens times the head's width."""

BACKWARD = {False: Tile(elements=2048, warps=4), True: Tile(elements=2048, warps=8)}
"""Likewise."""


def split_heads_triton(
    projected: Tensor, heads: int, theta: Tensor | None, positions: Tensor | None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Query and key [B, T, H, D], or [B, T, H, 2 D] with theta, contiguous, from projected [B, T, 4 H D]."""
    B, T, width = projected.shape
    D = width // (4 * heads)
    shape = (B, T, heads, D if theta is None else 2 * D)
    query = torch.empty(shape, dtype=projected.dtype, device=projected.device)
    key = torch.empty(shape, dtype=projected.dtype, device=projected.device)
    if query.numel():
        rows = as_rows(projected)
        theta = theta if theta is None else theta.contiguous()
        positions = positions if positions is None else _one_for_each_token(positions, B, T)
        cut = _cut(rows.shape, rows.stride(), rows.dtype, rows.device, heads, theta is not None, tile)
        start(forward_kernel, cut, rows, theta, positions, query, key)
    return query, key


@lru_cache(maxsize=1024)
def _cut(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,  # as the next, for the key alone
    device: torch.device,
    heads: int,
    rotate: bool,
    tile: Tile | None,
) -> Cut:
    B, T, width = shape
    D = width // (4 * heads)
    tile = tile or FORWARD[rotate]
    BD = triton.next_power_of_2(D)
    BT = max(1, tile.elements // BD)
    grid = (triton.cdiv(B * T, BT) * heads, 1, 1)
    return Cut(grid, (B * T, T, *stride[:2], heads), (D, BD, BT, rotate), tile.warps)


def split_heads_backward_triton(
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    projected: Tensor,
    heads: int,
    theta: Tensor | None,
    positions: Tensor | None,
    learn: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of projected [B, T, 4 H D] and of theta [H, 1, D] float32, empty unless asked for by `learn`."""
    B, T, width = projected.shape
    D = width // (4 * heads)
    grad_projected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    tile = tile or BACKWARD[theta is not None]
    BD = triton.next_power_of_2(max(D, 1))
    BT = max(1, tile.elements // BD)
    tiles = triton.cdiv(B * T, BT)
    # [tiles, H, D]
    shares = torch.empty((tiles, heads, D) if learn else (0, 0, 0), dtype=torch.float32, device=projected.device)
    if grad_projected.numel():
        rows = as_rows(projected)
        with torch.cuda.device_of(projected):
            backward_kernel[(tiles * heads,)](
                *(grad.contiguous() for grad in grads),
                rows,
                theta if theta is None else theta.contiguous(),
                positions if positions is None else _one_for_each_token(positions, B, T),
                grad_projected,
                shares,
                B * T,
                T,
                *rows.stride()[:2],
                heads,
                D=D,
                BD=BD,
                BT=BT,
                ROTATE=theta is not None,
                LEARN=learn,
                num_warps=tile.warps,
            )
    return grad_projected, shares.sum(0).unsqueeze(1)


def _one_for_each_token(positions: Tensor, B: int, T: int) -> Tensor:
    """Positions as the kernels read them, [B, T] int64, contiguous: a copy of a row for all, or of other integers."""
    if positions.is_floating_point():
        raise TypeError(f"positions is {positions.dtype}; expected torch.int64")
    return positions.to(torch.int64).expand(B, T).contiguous()


@triton.jit
def sin_cos(x):
    """Sine and cosine of a float32 x, |x| < 10⁷, each to about 1e-7."""
    # The nearest multiple of pi / 2, which is subtracted in three parts: the first has 8 bits, so its product is exact.
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    r = tl.fma(turns, -1.5703125, x)
    r = tl.fma(turns, -4.837512969970703e-4, r)
    r = tl.fma(turns, -7.549789948768648e-8, r)
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = turns.to(tl.int32) & 3
    odd = (quadrant & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(quadrant >= 2, -sine, sine), tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)


@triton.jit(do_not_specialize=["R", "inner"])
def forward_kernel(
    p_ptr,
    theta_ptr,
    positions_ptr,
    q_ptr,
    k_ptr,
    R,
    inner,
    stride_po,
    stride_pi,
    H,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Write q and k, [R, H, D or 2 D] contiguous, from rows q, k, v, u of 4 H D elements."""
    i_h = tl.program_id(0) % H
    i_r = (tl.program_id(0) // H) * BT + tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    # [BT, BD]
    mask = (i_r < R)[:, None] & (i_d < D)[None, :]
    p_x = p_ptr + row_offsets(i_r, inner, stride_po, stride_pi)[:, None] + (i_h * D + i_d)[None, :]
    b_q = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    b_k = tl.load(p_x + H * D, mask=mask, other=0.0).to(tl.float32)
    b_q = b_q * tl.sigmoid(b_q)
    b_k = b_k * tl.sigmoid(b_k)
    dtype = q_ptr.dtype.element_ty
    if ROTATE:
        b_theta = tl.load(theta_ptr + i_h * D + i_d, mask=i_d < D, other=0.0)
        b_t = tl.load(positions_ptr + i_r, mask=i_r < R, other=0).to(tl.float32)
        b_sin, b_cos = sin_cos(b_t[:, None] * b_theta[None, :])
        offsets = (i_r.to(tl.int64) * H + i_h)[:, None] * (2 * D) + i_d[None, :]
        tl.store(q_ptr + offsets, (b_q * b_cos).to(dtype), mask=mask)
        tl.store(q_ptr + offsets + D, (b_q * b_sin).to(dtype), mask=mask)
        tl.store(k_ptr + offsets, (b_k * b_cos).to(dtype), mask=mask)
        tl.store(k_ptr + offsets + D, (b_k * b_sin).to(dtype), mask=mask)
    else:
        offsets = (i_r.to(tl.int64) * H + i_h)[:, None] * D + i_d[None, :]
        tl.store(q_ptr + offsets, b_q.to(dtype), mask=mask)
        tl.store(k_ptr + offsets, b_k.to(dtype), mask=mask)


@triton.jit
def _silu_backward(b_ds, b_x):
    b_sigmoid = tl.sigmoid(b_x)
    return b_ds * b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid))


@triton.jit(do_not_specialize=["R", "inner"])
def backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    du_ptr,
    p_ptr,
    theta_ptr,
    positions_ptr,
    dp_ptr,
    dtheta_ptr,
    R,
    inner,
    stride_po,
    stride_pi,
    H,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    ROTATE: tl.constexpr,
    LEARN: tl.constexpr,
):
    """Write the projection's gradient [R, 4 H D] and, if LEARN, each tile's share of theta's, [tiles, H, D] float32."""
    i_h = tl.program_id(0) % H
    i_tile = tl.program_id(0) // H
    i_r = i_tile * BT + tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    # [BT, BD]
    mask = (i_r < R)[:, None] & (i_d < D)[None, :]
    p_x = p_ptr + row_offsets(i_r, inner, stride_po, stride_pi)[:, None] + (i_h * D + i_d)[None, :]
    b_q = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    b_k = tl.load(p_x + H * D, mask=mask, other=0.0).to(tl.float32)
    narrow = (i_r.to(tl.int64) * H + i_h)[:, None] * D + i_d[None, :]
    if ROTATE:
        b_theta = tl.load(theta_ptr + i_h * D + i_d, mask=i_d < D, other=0.0)
        b_t = tl.load(positions_ptr + i_r, mask=i_r < R, other=0).to(tl.float32)
        b_sin, b_cos = sin_cos(b_t[:, None] * b_theta[None, :])
        wide = (i_r.to(tl.int64) * H + i_h)[:, None] * (2 * D) + i_d[None, :]
        b_dqc = tl.load(dq_ptr + wide, mask=mask, other=0.0).to(tl.float32)
        b_dqs = tl.load(dq_ptr + wide + D, mask=mask, other=0.0).to(tl.float32)
        b_dkc = tl.load(dk_ptr + wide, mask=mask, other=0.0).to(tl.float32)
        b_dks = tl.load(dk_ptr + wide + D, mask=mask, other=0.0).to(tl.float32)
        b_dq = b_dqc * b_cos + b_dqs * b_sin
        b_dk = b_dkc * b_cos + b_dks * b_sin
        if LEARN:
            b_angle = b_q * tl.sigmoid(b_q) * (b_dqs * b_cos - b_dqc * b_sin)
            b_angle += b_k * tl.sigmoid(b_k) * (b_dks * b_cos - b_dkc * b_sin)
            # [BD]
            b_dtheta = tl.sum(b_angle * b_t[:, None], axis=0)
            tl.store(dtheta_ptr + (i_tile.to(tl.int64) * H + i_h) * D + i_d, b_dtheta, mask=i_d < D)
    else:
        b_dq = tl.load(dq_ptr + narrow, mask=mask, other=0.0).to(tl.float32)
        b_dk = tl.load(dk_ptr + narrow, mask=mask, other=0.0).to(tl.float32)
    dtype = dp_ptr.dtype.element_ty
    p_dx = dp_ptr + i_r.to(tl.int64)[:, None] * (4 * H * D) + (i_h * D + i_d)[None, :]
    tl.store(p_dx, _silu_backward(b_dq, b_q).to(dtype), mask=mask)
    tl.store(p_dx + H * D, _silu_backward(b_dk, b_k).to(dtype), mask=mask)
    tl.store(p_dx + 2 * H * D, tl.load(dv_ptr + narrow, mask=mask, other=0.0), mask=mask)
    tl.store(p_dx + 3 * H * D, tl.load(du_ptr + narrow, mask=mask, other=0.0), mask=mask)
