"""What the modules of the Hopper sweep share: the arithmetic of `arithmetic.py` and `sweep.py` in Gluon."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tnllm_export.kernels.lightning_attention.hopper_buffers import C
from tnllm_export.kernels.lightning_attention.sweep_plan import TALL_WALK_COST, WALK_COST

# triton 3.7 renamed it.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier

LOG2_E = gl.constexpr(1.4426950408889634)
SLOW_RATE = gl.constexpr(0.6931471805599453)
FACTORED_RATE = gl.constexpr(1.0)  # up to it, a chunk's decay and its inverse are far from the ends of float32
POSTPONED = gl.constexpr(16.0)  # log2 of the decay of a state that is not applied yet, at most
NEGLIGIBLE = gl.constexpr(40.0)  # as in `sweep.py`


@gluon.jit
def in_direction(run: gl.constexpr, task, reverse, K: gl.constexpr, PARTS: gl.constexpr, REVERSE: gl.constexpr):
    """Call `run` for one direction. `reverse` counts where REVERSE is None: what runs is compiled for each."""
    if REVERSE is None:
        if reverse:
            run(task, K, PARTS, True)
        else:
            run(task, K, PARTS, False)
    else:
        run(task, K, PARTS, REVERSE)


@gluon.jit
def decayed(state, rate):
    """As `arithmetic.decayed`."""
    keep, change = decay_factors(rate)
    return state * keep + state * change


@gluon.jit
def upper_part(x):
    """X cut to a bfloat16 number, in float32."""
    return (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def upper_half(x):
    """`upper_part` as bfloat16: the upper halves of two elements in one instruction."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def split(x):
    """Two bfloat16 tiles whose sum is x but for 2^-16 of it."""
    return upper_half(x), (x - upper_part(x)).to(gl.bfloat16)


@gluon.jit
def scaled_parts(x, high_factor, low_factor):
    """Two bfloat16 tiles whose sum is x (high_factor + low_factor) but for 2^-17 of it, all of them bfloat16.

    Two elements at a time. What rounding x high_factor leaves out is a bfloat16 number itself.
    """
    high = gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, high_factor], dtype=gl.bfloat16, is_pure=True, pack=2
    )
    low = gl.inline_asm_elementwise(
        "{ .reg .b32 rest; neg.bf16x2 rest, $3; fma.rn.bf16x2 rest, $1, $2, rest; fma.rn.bf16x2 $0, $1, $4, rest; }",
        "=r,r,r,r,r",
        [x, high_factor, high, low_factor],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )
    return high, low


@gluon.jit
def decay_factors(rate):
    """As `arithmetic.decay_factors`."""
    series = -rate * (1.0 - rate * (0.5 - rate * (0.16666667 - rate * (0.041666668 - rate * 0.008333334))))
    decay = gl.exp2(-rate * LOG2_E)
    slow = rate < SLOW_RATE
    change = gl.where(slow, gl.where(rate < 0.1, series, decay - 1.0), decay)
    return gl.where(slow, 1.0, 0.0), change


@gluon.constexpr_function
def shorter(K):
    """As `sweep.SHORTER`, for K keys."""
    return math.log2(1 - (WALK_COST if K <= 128 else TALL_WALK_COST))


@gluon.jit
def recomputing(i_segment, segments, n_chunks, K: gl.constexpr):
    """As `sweep._recomputing`."""
    SHORTER: gl.constexpr = shorter(K)
    share = (1.0 - gl.exp2(i_segment * SHORTER)) / (1.0 - gl.exp2(segments * SHORTER))
    return (n_chunks * share + 0.5).to(gl.int32)


@gluon.jit
def chunk_start(i, sequence, REVERSE: gl.constexpr):
    """First token of the i-th chunk on the way.

    The last chunk of a sequence ends with its last valid token, so no chunk holds padding. The first one may begin
    before token 0: what a tensor map reads there is 0, and its output is written without one (`hopper_store.copy_out`).
    """
    _, n_chunks, length = sequence
    return length - ((i + 1) if REVERSE else (n_chunks - i)) * C


@gluon.jit
def tokens_of(t0):
    """Valid tokens of the chunk that starts at t0, its last ones."""
    return C + gl.minimum(t0, 0)


@gluon.jit
def tokens_before(i, sequence, REVERSE: gl.constexpr):
    """Valid tokens of the first i chunks on the way."""
    _, n_chunks, length = sequence
    if REVERSE:
        return gl.minimum(i * C, length)
    return gl.maximum(length - (n_chunks - i) * C, 0)


@gluon.jit
def decays_now(slope, since, is_last):
    """Whether a state that has not decayed for `since` tokens, those of the chunk at hand included, does it here."""
    return is_last | (gl.abs(slope) * LOG2_E * (since + C) > POSTPONED)


@gluon.jit
def progression(first, step, layout: gl.constexpr):
    """[C] numbers: first, first + step, first + 2 step, … along the columns of `layout`.

    Places are taken as 8 i + j: i is known for each register, so that no register has to hold it.
    """
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    places = gl.arange(0, C, layout=column_layout).reshape([C // 8, 8])
    i = gl.arange(0, C // 8, layout=gl.SliceLayout(1, places.type.layout)).to(gl.float32)
    j = gl.arange(0, 8, layout=gl.SliceLayout(0, places.type.layout)).to(gl.float32)
    numbers = (first + step * j)[None, :] + (8.0 * step) * i[:, None]
    return gl.convert_layout(numbers.reshape([C]), column_layout, assert_trivial=True)


@gluon.jit
def wait_for(p_count, least):
    """As `arithmetic.wait_for`."""
    found = gl.atomic_add(p_count, 0, sem="acquire")
    while found < least:
        found = gl.atomic_add(p_count, 0, sem="acquire")
    barrier()
