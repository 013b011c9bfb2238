"""What the Triton kernels share: decay without drift, matrix products of float32 tiles on tensor cores, and waiting."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
SLOW_RATE = tl.constexpr(0.6931471805599453)  # as in `step.py`


@triton.jit
def decay_factors(rate):
    """(keep, change) with keep + change = exp(-rate) and keep either 0 or 1, as in `step.py`."""
    # expm1(-rate) by its series where exp(-rate) - 1 would cancel.
    series = -rate * (1.0 - rate * (0.5 - rate * (0.16666667 - rate * (0.041666668 - rate * 0.008333334))))
    decay = tl.exp2(-rate * LOG2_E)
    slow = rate < SLOW_RATE
    change = tl.where(slow, tl.where(rate < 0.1, series, decay - 1.0), decay)
    return tl.where(slow, 1.0, 0.0), change


@triton.jit
def decayed(state, rate):
    """exp(-rate) state. A slow head loses a small change, which keeps its precision."""
    keep, change = decay_factors(rate)
    return tl.fma(state, change, state * keep)


@triton.jit
def parts(x):
    """Two bfloat16 tiles whose sum is x: but for 2^-16 of a float32 x, exactly for a float16 x of ordinary size."""
    wide = x.to(tl.float32)
    # Cut, not rounded: the remainder is as exact, and a cut number takes one instruction.
    high = (wide.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (wide - high).to(tl.bfloat16)


@triton.jit
def product(a, b, c):
    """Compute c + a b, [M, N] float32, of tiles of one dtype; float32 tiles in IEEE arithmetic."""
    if INTERPRETED:  # whose product knows no bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def product_wide_left(a, b, c):
    """Compute c + a b, [M, N] float32, of a float32 tile `a` and an input tile `b`."""
    if b.dtype == tl.float32:
        return product(a, b, c)
    a_high, a_low = parts(a)
    if b.dtype == tl.bfloat16:
        return product(a_low, b, product(a_high, b, c))
    b_high, b_low = parts(b)
    return product(a_high, b_low, product(a_low, b_high, product(a_high, b_high, c)))


@triton.jit
def product_wide_right(a, b, c):
    """Compute c + a b, [M, N] float32, of an input tile `a` and a float32 tile `b`."""
    if a.dtype == tl.float32:
        return product(a, b, c)
    b_high, b_low = parts(b)
    if a.dtype == tl.bfloat16:
        return product(a, b_low, product(a, b_high, c))
    a_high, a_low = parts(a)
    return product(a_low, b_high, product(a_high, b_low, product(a_high, b_high, c)))


@triton.jit
def wait_for(p_count, least):
    """Wait until other programs have counted up to `least`; what they stored before is seen then."""
    found = tl.atomic_add(p_count, 0, sem="acquire")
    while found < least:
        found = tl.atomic_add(p_count, 0, sem="acquire")
    tl.debug_barrier()
