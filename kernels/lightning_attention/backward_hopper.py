"""The sweeps of a backward (see `chunk.py`) that have the same sizes in one grid, for Hopper GPUs.

One after the other, each would be cut into segments to fill the device, and walk tokens twice. Together they have two
or three times the columns, so they are cut less often, and what a launch costs is paid once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tnllm_export.kernels.lightning_attention.sweep_hopper import place_of_program, sweep_program


@gluon.jit
def backward_hopper_kernel(  # noqa: D103
    query,
    key,
    value,
    grad_output,
    grad_query,
    grad_key,
    grad_value,
    p_grad_query,
    p_grad_key,
    p_grad_value,
    p_slope_rate,
    p_past_state,
    p_grad_state,
    p_lengths,
    p_grad_past,
    p_carry,
    p_progress,
    T,
    H,
    stores_grad_past,
    past_stride_b,
    past_stride_h,
    past_stride_k,
    past_stride_v,
    grad_state_stride_b,
    grad_state_stride_h,
    grad_state_stride_k,
    grad_state_stride_v,
    K: gl.constexpr,
    V: gl.constexpr,
    PARTS: gl.constexpr,
    SWEEPS: gl.constexpr,
    HANDOVER: gl.constexpr,
):
    i_place, i_segment = place_of_program(p_progress, HANDOVER)
    columns = gl.num_programs(0) // SWEEPS
    i_sweep = i_place // columns
    if i_sweep == 0:
        # the state's transpose
        asks, row, column, answer = grad_output, value, key, grad_query
        p_answer = p_grad_query
        p_state, state_b, state_h = p_past_state, past_stride_b, past_stride_h
        state_k, state_v = past_stride_v, past_stride_k
    elif i_sweep == 1:
        # the transpose of the state's gradient
        asks, row, column, answer = value, grad_output, query, grad_key
        p_answer = p_grad_key
        p_state, state_b, state_h = p_grad_state, grad_state_stride_b, grad_state_stride_h
        state_k, state_v = grad_state_stride_v, grad_state_stride_k
    else:
        asks, row, column, answer = key, query, grad_output, grad_value
        p_answer = p_grad_value
        p_state, state_b, state_h = p_grad_state, grad_state_stride_b, grad_state_stride_h
        state_k, state_v = grad_state_stride_k, grad_state_stride_v
    # Results are dense. With two sweeps, none of them writes columns of values.
    sweep_program(
        (asks, row, column, answer),
        (p_answer, H.to(gl.int64) * K * T, H * K, K),
        (p_state, state_b, state_h, state_k, state_v),
        (p_grad_past, H * (K * V), K * V, V, 1),
        (i_sweep == 2) & (stores_grad_past != 0),
        i_sweep > 0,
        p_slope_rate,
        p_lengths,
        p_carry,
        p_progress,
        T,
        H,
        i_place,
        i_place % columns,
        i_segment,
        V,
        K,
        PARTS,
        None,
        HANDOVER,
        True,
    )
