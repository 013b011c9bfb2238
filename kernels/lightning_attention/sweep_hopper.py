"""The sweep (see `sweep.py`) for Hopper GPUs, bfloat16, K of 64, 128 or 256: the same cut, the same arithmetic.

Triton's own pipelining starts a chunk's loads when the chunk before it is done, and waits for each matrix product.
Here, in Gluon, Triton's lower level, three groups of four warps fill a multiprocessor and meet at barriers in shared
memory only. Two of them own 64 columns of the state each, in registers (`hopper_own.py`):

    O = S Qᵀ                the state in two parts
    O += Vᵀ scores
    S = decay S + Vᵀ K      the values decayed, while O is written

and the third prepares for both (`hopper_prepare.py`): it starts the copies and makes the scores, up to two chunks
ahead. So the tensor cores have work while a group computes. Where K is 256 the two own 128 rows each of the same 64
columns, one adds to its part of an output what the other has, and a further warp starts the copies (`hopper_load.py`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tnllm_export.kernels.lightning_attention.hopper_arithmetic import NEGLIGIBLE, barrier, recomputing
from tnllm_export.kernels.lightning_attention.hopper_buffers import (
    HALF,
    OUT_STAGES,
    SCORE_STAGES,
    C,
    halves_of,
    stages_of,
    walk_stages_of,
)
from tnllm_export.kernels.lightning_attention.hopper_load import load
from tnllm_export.kernels.lightning_attention.hopper_own import own
from tnllm_export.kernels.lightning_attention.hopper_prepare import prepare, score

# 168 for each thread are there at the start; the owners need more, who prepares does with less.
OWNER_REGISTERS = gl.constexpr(208)
PREPARE_REGISTERS = gl.constexpr(88)
# With a fourth group, of which one warp works, 128 are there.
SCORE_REGISTERS = gl.constexpr(72)
LOAD_REGISTERS = gl.constexpr(24)


@gluon.jit
def sweep_hopper_kernel(  # noqa: D103
    query,
    key,
    value,
    output,
    p_output,
    p_slope_rate,
    p_past_state,
    p_lengths,
    p_present_state,
    p_carry,
    p_progress,
    T,
    H,
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
    PARTS: gl.constexpr,
    REVERSE: gl.constexpr,
    HANDOVER: gl.constexpr,
    STORE_STATE: gl.constexpr,
):
    i_column, i_segment = place_of_program(p_progress, HANDOVER)
    always = i_column * 0 == 0  # a value, as where several sweeps share a launch; the compiler sees through it
    sweep_program(
        (query, key, value, output),
        (p_output, output_stride_b, output_stride_t, output_stride_h),
        (p_past_state, past_stride_b, past_stride_h, past_stride_k, past_stride_v),
        (p_present_state, present_stride_b, present_stride_h, present_stride_k, present_stride_v),
        always,
        always,
        p_slope_rate,
        p_lengths,
        p_carry,
        p_progress,
        T,
        H,
        i_column,
        i_column,
        i_segment,
        K,
        V,
        PARTS,
        REVERSE,
        HANDOVER,
        STORE_STATE,
    )


@gluon.jit
def place_of_program(p_progress, HANDOVER: gl.constexpr):
    """Return this program's column of the grid and its segment."""
    if HANDOVER == "lookback":
        # Segments in the order in which programs start: those before one run already.
        ticket = gl.atomic_add(p_progress, 1, sem="relaxed")
        i_segment = ticket // gl.num_programs(0)
        # The last heads first, which by custom remember longest and so walk most.
        i_column = gl.num_programs(0) - 1 - ticket % gl.num_programs(0)
    else:
        i_segment = gl.program_id(1)
        i_column = gl.program_id(0)
    return i_column, i_segment


@gluon.jit
def prefetch_state(past, column, K: gl.constexpr, BV: gl.constexpr):
    """Bring the past state into L2 before copies are in its way."""
    p_past, stride_k, stride_v = past
    LINE: gl.constexpr = 32  # of numbers
    place = gl.arange(0, K * BV // LINE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    # Whichever of rows and columns are dense.
    rows = gl.where(stride_v == 1, place // (BV // LINE), place % (K // LINE) * LINE)
    columns = gl.where(stride_v == 1, place % (BV // LINE) * LINE, place // (K // LINE))
    lines = p_past + rows * stride_k + (column + columns) * stride_v
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Allocate barriers that are passed by that many arrivals."""
    memory = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(memory.index(i), count=ARRIVALS)
    return memory


@gluon.jit
def sweep_program(  # noqa: PLR0915
    tensors,
    answer,
    past,
    present,
    stores_state,
    reverse,
    p_slope_rate,
    p_lengths,
    p_carry,
    p_progress,
    T,
    H,
    i_place,
    i_column,
    i_segment,
    K: gl.constexpr,
    V: gl.constexpr,
    PARTS: gl.constexpr,
    REVERSE: gl.constexpr,
    HANDOVER: gl.constexpr,
    STORE_STATE: gl.constexpr,
):
    """Do one segment of one sweep, for one block of a head's columns.

    Args:
        tensors: Tensor maps of query, key, value and output.
        answer: Address of the output and strides of batch, token and head.
        past, present: Address and strides of batch, head, key row and column.
        stores_state: Whether the last segment writes `present`, if STORE_STATE.
        reverse: Whether the state goes from the last token to the first, if REVERSE is None, which says so else.
        i_place: Of the column among all of the grid, which has its own places in `p_carry` and `p_progress`.
        i_column: Of the column among those of this sweep: a row of the batch, a head, a block of columns.
    """
    KP: gl.constexpr = K // PARTS
    STAGES: gl.constexpr = stages_of(K)
    WALK_STAGES: gl.constexpr = walk_stages_of(K)
    HALVES: gl.constexpr = halves_of(PARTS)
    BV: gl.constexpr = HALVES * HALF
    NV: gl.constexpr = V // BV
    row_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, KP], gl.bfloat16)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, HALF], gl.bfloat16)

    i_v = i_column % NV
    i_b = (i_column // NV) // H
    i_h = (i_column // NV) % H
    batch = i_b.to(gl.int64)
    head = i_h.to(gl.int64)
    column = i_v * BV
    past = (past[0] + batch * past[1] + head * past[2], past[3], past[4])
    if HANDOVER == "lookback":
        if i_segment == 0:
            prefetch_state(past, column, K, BV)
    else:
        prefetch_state(past, column, K, BV)
    # They come while barriers are made.
    length = gl.load(p_lengths + i_b)
    slope = gl.load(p_slope_rate + i_h)

    rows = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES * PARTS, C, KP], row_tile)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES * HALVES + SCORE_STAGES * 2, C, HALF], tile)
    out = gl.allocate_shared_memory(gl.bfloat16, [OUT_STAGES * HALVES, C, HALF], tile)
    # Nothing where the owners' columns differ.
    partial = gl.allocate_shared_memory(
        gl.float32, [HALF if PARTS == 2 else 1, C if PARTS == 2 else 1], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    )
    decays = gl.allocate_shared_memory(gl.bfloat16, [SCORE_STAGES * 2, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    answer_decays = gl.allocate_shared_memory(gl.float32, [SCORE_STAGES, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Each kind of barrier by itself: between one of an allocation and the next the compiler syncs all warps.
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    walk_full = barriers(WALK_STAGES, 1)
    walk_empty = barriers(WALK_STAGES, 2)
    scored = barriers(SCORE_STAGES, 1)
    exchanged = barriers(1, 1)
    asked = barriers(STAGES if STAGES == 2 else 1, 2)
    fence_async_shared()
    barrier()

    heads = gl.num_programs(0)
    segments = gl.num_programs(1)
    length = gl.maximum(gl.minimum(length, T), 0)
    n_chunks = (length + C - 1) // C
    segment_chunks = gl.maximum((n_chunks + segments - 1) // segments, 1)
    n_segments = gl.maximum((n_chunks + segment_chunks - 1) // segment_chunks, 1)
    first = gl.minimum(i_segment * segment_chunks, n_chunks)
    end = gl.minimum(first + segment_chunks, n_chunks)
    # What is walked without output, before the answer.
    remembered = (1.0 / gl.maximum(slope * C, 1e-6) * NEGLIGIBLE).to(gl.int32) + 2
    walk_begin = first
    walk_end = first
    if HANDOVER == "recompute":
        n_segments = segments
        first = recomputing(i_segment, segments, n_chunks, K)
        end = recomputing(i_segment + 1, segments, n_chunks, K)
        wanted = (first < end) | (i_segment == segments - 1)
        walk_begin = gl.where(wanted, gl.maximum(first - remembered, 0), first)
        walk_end = first
    if HANDOVER == "lookback":
        walk_end = gl.where(i_segment < n_segments - 1, end, first)
        walk_begin = gl.maximum(walk_end - remembered, first)
    p_slots = p_carry + i_place.to(gl.int64) * (K * BV)
    p_ready = p_progress + 1 + i_place
    buffers = (
        rows,
        tiles,
        out,
        partial,
        decays,
        answer_decays,
        full,
        empty,
        walk_full,
        walk_empty,
        scored,
        exchanged,
        asked,
    )
    query, key, value, output = tensors
    sequence = (slope, n_chunks, length)
    way = (walk_begin, walk_end, first, end, column)
    place = (i_segment, n_segments, segment_chunks, segments, heads, T)
    present = (present[0] + batch * present[1] + head * present[2], present[3], present[4])
    memory = (past, present, stores_state, p_slots, p_ready)
    output = (output, i_b, i_h, answer[0] + batch * answer[1] + head * answer[3], answer[2])
    answering = (buffers, sequence, way, place, output, memory)
    scoring = (buffers, sequence, way)
    preparing = (buffers, sequence, way, (query, key, value, i_b, i_h))
    if STAGES > 2:
        gl.warp_specialize(
            [
                (own, (0, answering, reverse, K, PARTS, REVERSE, HANDOVER, STORE_STATE)),
                (own, (1, answering, reverse, K, PARTS, REVERSE, HANDOVER, STORE_STATE)),
                (prepare, (preparing, reverse, K, PARTS, REVERSE)),
            ],
            [4, 4],
            [OWNER_REGISTERS, PREPARE_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (own, (0, answering, reverse, K, PARTS, REVERSE, HANDOVER, STORE_STATE)),
                (own, (1, answering, reverse, K, PARTS, REVERSE, HANDOVER, STORE_STATE)),
                (score, (scoring, reverse, K, PARTS, REVERSE)),
                (load, (preparing, reverse, K, PARTS, REVERSE)),
            ],
            [4, 4, 1],
            [OWNER_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS],
        )
