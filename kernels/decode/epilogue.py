"""What is done with the sums of a matrix product, in registers: SiLU and LRPE, the gate's parts, residual, product."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from tnllm_export.kernels.layer.triton_kernels.heads import sin_cos


@triton.jit
def finish(
    sums,
    sums_2,
    i_b,
    i_n,
    p_output,
    p_key,
    p_value,
    p_gate,
    p_theta,
    p_positions,
    B: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    OUTPUT: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Write float32 sums of rows i_n for tokens i_b, which broadcast to the sums' shape and are ignored past B and N.

    OUTPUT is "heads" (rows of q, k, v, u one after another: SiLU on q and k, with ROTATE LRPE's cosine and sine parts),
    "residual" (added to the output), "product" (with sums_2) or "store".
    """
    mask = (i_b < B) & (i_n < N)
    if OUTPUT == "heads":
        d: tl.constexpr = N // 4
        D: tl.constexpr = d // HEADS
        part = i_n // d
        column = i_n % d
        activated = sums * tl.sigmoid(sums)
        dtype = p_output.dtype.element_ty
        if ROTATE:
            theta = tl.load(p_theta + column)
            position = tl.load(p_positions + i_b, mask=i_b < B, other=0).to(tl.float32)
            sine, cosine = sin_cos(position * theta)
            to = i_b * (2 * d) + (column // D) * (2 * D) + column % D
            tl.store(p_output + to, (activated * cosine).to(dtype), mask=mask & (part == 0))
            tl.store(p_output + to + D, (activated * sine).to(dtype), mask=mask & (part == 0))
            tl.store(p_key + to, (activated * cosine).to(dtype), mask=mask & (part == 1))
            tl.store(p_key + to + D, (activated * sine).to(dtype), mask=mask & (part == 1))
        else:
            tl.store(p_output + i_b * d + column, activated.to(dtype), mask=mask & (part == 0))
            tl.store(p_key + i_b * d + column, activated.to(dtype), mask=mask & (part == 1))
        tl.store(p_value + i_b * d + column, sums.to(dtype), mask=mask & (part == 2))
        tl.store(p_gate + i_b * d + column, sums.to(dtype), mask=mask & (part == 3))
    else:
        to = i_b * N + i_n
        if OUTPUT == "residual":
            sums += tl.load(p_output + to, mask=mask, other=0.0).to(tl.float32)
        if OUTPUT == "product":
            sums *= sums_2
        tl.store(p_output + to, sums.to(p_output.dtype.element_ty), mask=mask)
