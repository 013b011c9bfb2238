"""A linear map of one token, or of few: weights stream through registers, read once, 16 bytes at a time.

A program owns BN rows of the weights and BB tokens; a larger batch finds the rows in L2 again. The first tile of them
is under way before the previous kernel has ended, and each next one before the last is used. A norm in front of the map
needs no pass of its own: the map is linear, so the sum of squares is taken beside the products and scales what comes
out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from tnllm_export.kernels.decode.epilogue import finish
from tnllm_export.kernels.decode.overlap import previous_is_done
from tnllm_export.kernels.layer.norm import EPSILON

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _within_threads(x, VEC: tl.constexpr):
    """Sum neighbours that one thread holds: [BB, BN, BK] -> [BB, BN, BK / VEC]."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // VEC, VEC)), axis=3)


@triton.jit
def _products(b_w, b_a, VEC: tl.constexpr):
    return _within_threads(b_w.to(tl.float32) * b_a, VEC)


@triton.jit
def matvec_kernel(
    p_input,
    p_other,
    p_weight,
    p_weight_2,
    p_output,
    p_key,
    p_value,
    p_gate,
    p_theta,
    p_positions,
    B: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    INPUT: tl.constexpr,
    OUTPUT: tl.constexpr,
    ROTATE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    VEC: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Map [B, K] to [B, N]: INPUT is "plain", "norm" (of the input) or "gate" (input times the norm of other)."""
    GROUPS: tl.constexpr = (B + BB - 1) // BB
    i_tile = tl.program_id(0) // GROUPS
    first = (tl.program_id(0) % GROUPS) * BB
    # Three dimensions throughout, so that all tiles lie in registers alike: [BB, BN, BK].
    i_b = first + tl.arange(0, BB)[:, None, None]
    i_r = tl.arange(0, BN)[None, :, None]
    i_k = tl.arange(0, BK)[None, None, :]
    p_tile = p_weight + i_tile.to(tl.int64) * (BN * K)
    p_tile_2 = p_weight_2 + i_tile.to(tl.int64) * (BN * K)
    offsets = i_r * K + i_k
    row_mask = i_tile * BN + i_r < N
    EVEN: tl.constexpr = N % BN == 0
    b_w = _tile(p_tile, offsets, i_k, row_mask, 0, K, BK, EVEN)
    if OUTPUT == "product":
        b_w_2 = _tile(p_tile_2, offsets, i_k, row_mask, 0, K, BK, EVEN)
    previous_is_done(OVERLAP)

    sums = tl.zeros((BB, BN, BK // VEC), tl.float32)
    sums_2 = tl.zeros((BB, BN if OUTPUT == "product" else 1, BK // VEC), tl.float32)
    squares = tl.zeros((BB, 1, BK // VEC), tl.float32)
    for k in range(0, K, BK):
        b_w_now = b_w
        if OUTPUT == "product":
            b_w_2_now = b_w_2
        if BK < K:
            b_w = _tile(p_tile, offsets, i_k, row_mask, k + BK, K, BK, EVEN)
            if OUTPUT == "product":
                b_w_2 = _tile(p_tile_2, offsets, i_k, row_mask, k + BK, K, BK, EVEN)
        # [BB, 1, BK]
        mask = (i_b < B) & (k + i_k < K)
        b_a = tl.load(p_input + i_b * K + (k + i_k), mask=mask, other=0.0).to(tl.float32)
        if INPUT == "norm":
            squares += _within_threads(b_a * b_a, VEC)
        if INPUT == "gate":
            b_o = tl.load(p_other + i_b * K + (k + i_k), mask=mask, other=0.0).to(tl.float32)
            squares += _within_threads(b_o * b_o, VEC)
            b_a *= b_o
        sums += _products(b_w_now, b_a, VEC)
        if OUTPUT == "product":
            sums_2 += _products(b_w_2_now, b_a, VEC)

    # [BB, BN]
    total = tl.sum(sums, axis=2)
    total_2 = tl.sum(sums_2, axis=2)
    if INPUT != "plain":
        scale = tl.rsqrt(tl.sum(squares, axis=2) / K + _EPSILON)
        total *= scale
        total_2 *= scale
    i_b = first + tl.arange(0, BB)[:, None]
    i_n = i_tile * BN + tl.arange(0, BN)[None, :]
    finish(
        total,
        total_2,
        i_b,
        i_n,
        p_output,
        p_key,
        p_value,
        p_gate,
        p_theta,
        p_positions,
        B,
        N,
        HEADS,
        OUTPUT,
        ROTATE,
    )


@triton.jit
def _tile(p_tile, offsets, i_k, row_mask, k, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """Weights [1, BN, BK] from column k on, zero past the end."""
    mask = k + i_k < K
    if not EVEN:
        mask = mask & row_mask
    return tl.load(p_tile + k + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
