"""The sweep (see `sweep.py`) for Hopper GPUs, bfloat16, key rows of 64 or 128: the same cut, the same arithmetic.

Triton's own pipelining starts a chunk's loads when the chunk before it is done, and waits for each matrix product.
Here, in Gluon, Triton's lower level, three groups of four warps fill a multiprocessor and meet at barriers in shared
memory only. Two of them own 64 columns of the state each, in registers (`hopper_own.py`):

    O = S Qᵀ                the state in two parts
    O += Vᵀ scores
    S = decay S + Vᵀ K      the values decayed, while O is written

and the third prepares for both (`hopper_prepare.py`): it starts the copies and makes the scores, up to two chunks
ahead. So the tensor cores have work while a group computes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tnllm_export.kernels.lightning_attention.hopper_arithmetic import (
    BARRIERS,
    EMPTY,
    FULL,
    HALF,
    NEGLIGIBLE,
    OUT_STAGES,
    PARTIAL,
    SCORE_STAGES,
    SCORED,
    WALK_EMPTY,
    WALK_FULL,
    C,
    barrier,
)
from tnllm_export.kernels.lightning_attention.hopper_own import own
from tnllm_export.kernels.lightning_attention.hopper_prepare import prepare

# 168 for each thread are there at the start; the owners need more, who prepares does with less.
OWNER_REGISTERS = gl.constexpr(208)
PREPARE_REGISTERS = gl.constexpr(88)


# One variant for all numbers of tokens and heads.
@gluon.jit(do_not_specialize=("T", "H"))
def sweep_hopper_kernel(  # noqa: D103, PLR0915
    p_query,
    p_key,
    p_value,
    p_slope_rate,
    p_past_state,
    p_lengths,
    p_output,
    p_present_state,
    p_carry,
    p_progress,
    T,
    H,
    query_stride_b,
    query_stride_t,
    query_stride_h,
    key_stride_b,
    key_stride_t,
    key_stride_h,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    output_stride_b,
    output_stride_t,
    output_stride_h,
    past_stride_b,
    past_stride_h,
    past_stride_k,
    past_stride_v,
    present_stride_b,
    present_stride_h,
    present_stride_k,
    present_stride_v,
    K: gl.constexpr,
    V: gl.constexpr,
    REVERSE: gl.constexpr,
    HANDOVER: gl.constexpr,
    STORE_STATE: gl.constexpr,
):
    # Keys of 256 are cut in two: each owner has 128 rows of the same 64 columns.
    PARTS: gl.constexpr = 2 if K > 128 else 1
    KP: gl.constexpr = K // PARTS
    STAGES: gl.constexpr = 3 if PARTS == 1 else 2  # chunks whose queries, keys and values have a buffer
    HALVES: gl.constexpr = 2 if PARTS == 1 else 1
    BV: gl.constexpr = HALVES * HALF
    NV: gl.constexpr = V // BV
    row_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, KP], gl.bfloat16)
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, HALF], gl.bfloat16)

    heads = gl.num_programs(0)
    segments = gl.num_programs(1)
    if HANDOVER == "lookback":
        ticket = gl.atomic_add(p_progress, 1, sem="relaxed")
        i_segment = ticket // heads
        i_column = ticket % heads
    else:
        i_segment = gl.program_id(1)
        i_column = gl.program_id(0)
    i_v = i_column % NV
    i_b = (i_column // NV) // H
    i_h = (i_column // NV) % H

    length = gl.maximum(gl.minimum(gl.load(p_lengths + i_b), T), 0)
    n_chunks = (length + C - 1) // C
    slope = gl.load(p_slope_rate + i_h)
    segment_chunks = gl.maximum((n_chunks + segments - 1) // segments, 1)
    n_segments = gl.maximum((n_chunks + segment_chunks - 1) // segment_chunks, 1)
    first = gl.minimum(i_segment * segment_chunks, n_chunks)
    end = gl.minimum(first + segment_chunks, n_chunks)
    # What is walked without output, before the answer.
    remembered = (1.0 / gl.maximum(slope * C, 1e-6) * NEGLIGIBLE).to(gl.int32) + 2
    walk_begin = first
    walk_end = first
    if HANDOVER == "recompute":
        walk_begin = gl.where(i_segment < n_segments, gl.maximum(first - remembered, 0), first)
    if HANDOVER == "lookback":
        walk_end = gl.where(i_segment < n_segments - 1, end, first)
        walk_begin = gl.maximum(walk_end - remembered, first)
    column = i_v * BV

    p_output += i_b.to(gl.int64) * output_stride_b + i_h.to(gl.int64) * output_stride_h
    p_query += i_b.to(gl.int64) * query_stride_b + i_h.to(gl.int64) * query_stride_h
    p_key += i_b.to(gl.int64) * key_stride_b + i_h.to(gl.int64) * key_stride_h
    p_value += i_b.to(gl.int64) * value_stride_b + i_h.to(gl.int64) * value_stride_h

    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, C, KP], row_tile)
    queries = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, C, KP], row_tile)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES * HALVES, C, HALF], value_tile)
    scores = gl.allocate_shared_memory(gl.bfloat16, [SCORE_STAGES * 2, C, C], value_tile)
    out = gl.allocate_shared_memory(gl.bfloat16, [OUT_STAGES * HALVES, C, HALF], value_tile)
    # What one owner has of an output, for the other; nothing where their columns differ.
    partial = gl.allocate_shared_memory(
        gl.float32, [HALF if PARTS == 2 else 1, C if PARTS == 2 else 1], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    )
    decays = gl.allocate_shared_memory(gl.bfloat16, [SCORE_STAGES * 2, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barriers = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(FULL + stage), count=1)
        mbarrier.init(barriers.index(EMPTY + stage), count=2)
        mbarrier.init(barriers.index(WALK_FULL + stage), count=1)
        mbarrier.init(barriers.index(WALK_EMPTY + stage), count=2)
    for stage in gl.static_range(SCORE_STAGES):
        mbarrier.init(barriers.index(SCORED + stage), count=1)
    mbarrier.init(barriers.index(PARTIAL), count=1)
    fence_async_shared()
    barrier()

    p_past_state += i_b.to(gl.int64) * past_stride_b + i_h.to(gl.int64) * past_stride_h
    p_present_state += i_b.to(gl.int64) * present_stride_b + i_h.to(gl.int64) * present_stride_h
    p_slots = p_carry + i_column.to(gl.int64) * (K * BV)
    p_ready = p_progress + 1 + i_column
    buffers = (keys, queries, values, scores, out, partial, decays, barriers)
    sequence = (slope, n_chunks, length)
    way = (walk_begin, walk_end, first, end, column)
    place = (i_segment, n_segments, segment_chunks, segments, heads)
    query = (p_query, query_stride_t)
    key = (p_key, key_stride_t)
    value = (p_value, value_stride_t)
    output = (p_output, output_stride_t, T)
    past = (p_past_state, past_stride_k, past_stride_v)
    present = (p_present_state, present_stride_k, present_stride_v)
    memory = (past, present, p_slots, p_ready)
    gl.warp_specialize(
        [
            (own, (0, buffers, sequence, way, place, output, memory, K, V, REVERSE, HANDOVER, STORE_STATE)),
            (own, (1, buffers, sequence, way, place, output, memory, K, V, REVERSE, HANDOVER, STORE_STATE)),
            (prepare, (buffers, sequence, way, query, key, value, K, V, REVERSE)),
        ],
        [4, 4],
        [OWNER_REGISTERS, PREPARE_REGISTERS],
    )
