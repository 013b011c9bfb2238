"""A linear map of a batch of tokens: weights stream through shared memory into the tensor cores, read once.

A program owns BN rows of the weights or, where a map has too few rows to busy the chip, one of SPLIT parts of their
columns. The program that ends last of those adds the parts up, in their order whoever was last: no result depends on
timing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from tnllm_export.kernels.decode.epilogue import finish
from tnllm_export.kernels.decode.overlap import previous_is_done
from tnllm_export.kernels.lightning_attention.arithmetic import product

_LINE = tl.constexpr(128)
"""Bytes of a cache line."""


@triton.jit
def matmul_kernel(
    p_input,
    p_weight,
    p_weight_2,
    p_output,
    p_key,
    p_value,
    p_gate,
    p_theta,
    p_positions,
    p_parts,
    p_arrivals,
    B: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    OUTPUT: tl.constexpr,
    ROTATE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Map [B, K] to [B, N]."""
    TILES: tl.constexpr = (N + BN - 1) // BN
    # Columns of a part, whole blocks.
    KS: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    i_tile = tl.program_id(0) // SPLIT
    i_split = tl.program_id(0) % SPLIT
    first = i_split * KS
    i_r = tl.arange(0, BN)
    i_n = i_tile * BN + i_r
    i_b = tl.arange(0, BB)
    i_k = tl.arange(0, BK)
    p_tile = p_weight + i_tile.to(tl.int64) * (BN * K) + first
    p_tile_2 = p_weight_2 + i_tile.to(tl.int64) * (BN * K) + first
    if OVERLAP:
        _prefetch(p_tile, i_n < N, first, K, BN, BK, STAGES)
        if OUTPUT == "product":
            _prefetch(p_tile_2, i_n < N, first, K, BN, BK, STAGES)
    previous_is_done(OVERLAP)

    sums = tl.zeros((BN, BB), tl.float32)
    sums_2 = tl.zeros((BN, BB), tl.float32)
    for k in tl.range(0, tl.minimum(K - first, KS), BK, num_stages=STAGES):
        k_mask = first + k + i_k < K
        w_mask = k_mask[None, :] & (i_n < N)[:, None]
        # [BK, BB]
        b_x = tl.load(
            p_input + i_b[None, :] * K + (first + k + i_k)[:, None],
            mask=k_mask[:, None] & (i_b < B)[None, :],
            other=0.0,
        )
        offsets = i_r[:, None] * K + (k + i_k)[None, :]
        # [BN, BK]
        b_w = tl.load(p_tile + offsets, mask=w_mask, other=0.0, eviction_policy="evict_first")
        sums = product(b_w, b_x, sums)
        if OUTPUT == "product":
            b_w_2 = tl.load(p_tile_2 + offsets, mask=w_mask, other=0.0, eviction_policy="evict_first")
            sums_2 = product(b_w_2, b_x, sums_2)

    i_b = i_b[None, :]
    i_n = i_n[:, None]
    last = True
    if SPLIT > 1:
        # parts: [SPLIT, 1 or 2, TILES, BN, BB]
        PARTS: tl.constexpr = 2 if OUTPUT == "product" else 1
        to = i_tile * (BN * BB) + i_r[:, None] * BB + i_b
        size: tl.constexpr = TILES * BN * BB
        tl.store(p_parts + i_split * (PARTS * size) + to, sums)
        if OUTPUT == "product":
            tl.store(p_parts + (i_split * PARTS + 1) * size + to, sums_2)
        tl.debug_barrier()
        last = tl.atomic_add(p_arrivals + i_tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(p_arrivals + i_tile, 0)  # for the next map
            sums = tl.zeros((BN, BB), tl.float32)
            sums_2 = tl.zeros((BN, BB), tl.float32)
            for split in tl.static_range(SPLIT):
                sums += tl.load(p_parts + split * (PARTS * size) + to, cache_modifier=".cg")
                if OUTPUT == "product":
                    sums_2 += tl.load(p_parts + (split * PARTS + 1) * size + to, cache_modifier=".cg")
    if last:
        finish(
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
            B,
            N,
            HEADS,
            OUTPUT,
            ROTATE,
        )


@triton.jit
def _prefetch(p_tile, row_mask, first, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Have the first tiles of the weights fetched into L2."""
    WIDTH: tl.constexpr = _LINE // (p_tile.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = (BK + WIDTH - 1) // WIDTH
    i_line = tl.arange(0, LINES) * WIDTH
    for stage in tl.static_range(STAGES):
        column = stage * BK + i_line
        # Past the end, the start of the row.
        column = tl.where(first + column < K, column, -first)
        row = tl.where(row_mask, tl.arange(0, BN), 0)
        addresses = p_tile + row[:, None] * K + column[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
        )
