"""The chunk op and its gradients by Triton: four sweeps (see `sweep.py`).

With G_t the gradient of the state after token t, which decays backwards in time as the state does forwards,

    output     o_t  = q_tᵀ S_t,   S_t = exp(-s) S_{t-1} + k_t v_tᵀ      forward,  (q, k, v; S)
    query      dq_t = do_tᵀ S_tᵀ                                          forward,  (do, v, k; Sᵀ)
    key        dk_t = v_tᵀ G_tᵀ,  G_t = exp(-s) G_{t+1} + q_t do_tᵀ     reverse,  (v, do, q; Gᵀ)
    value      dv_t = k_tᵀ G_t                                            reverse,  (k, q, do; G)

so each is the same sweep over other tensors, and nothing but the inputs is kept for the backward. On Hopper those of
the last three that have the same sizes are one launch (see `backward_hopper.py`).
"""

import torch
from torch import Tensor

from tnllm_export.kernels.lightning_attention.handover_memory import handover_memory
from tnllm_export.kernels.lightning_attention.hopper_launch import KernelUnavailable
from tnllm_export.kernels.lightning_attention.launch import (
    allocate_with_torch,
    capability,
    is_current,
    launch,
)
from tnllm_export.kernels.lightning_attention.sweep_cut import (
    Cut,
    backward_cut,
    leave_out_hopper,
    rows_fit,
    state_fits,
    sweep_cut,
    sweeps_at_once,
)
from tnllm_export.kernels.lightning_attention.sweep_plan import SweepPlan, SweepTile


def lightning_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the chunk op. Args and results are those of `lightning_attention`."""
    output, present_state = _like(value), _like(past_state)
    sweep(query, key, value, slope_rate, past_state, lengths, output, present_state)
    return output, present_state


def lightning_attention_triton_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
    *,
    state_too: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key, value and, if `state_too`, of past_state.

    The other args are those of the blocked backward.
    """
    dq, dk, dv = _like(query), _like(key), _like(value)
    d_state = _like(past_state) if state_too else None
    # Here, where a copy serves several sweeps.
    query, key, value, grad_output = (_dense_rows(x) for x in (query, key, value, grad_output))
    past_state, grad_state = _near(past_state), _near(grad_state)
    inputs = (query, key, value, grad_output, slope_rate, past_state, grad_state, lengths)
    swept = sweep_back(inputs, (dq, dk, dv, d_state))
    if swept < 2:
        sweep(grad_output, value, key, slope_rate, past_state.mT, lengths, dq, None)
        sweep(value, grad_output, query, slope_rate, grad_state.mT, lengths, dk, None, reverse=True)
    if swept < 3:
        sweep(key, query, grad_output, slope_rate, grad_state, lengths, dv, d_state, reverse=True)
    return dq, dk, dv, d_state


def sweep(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
    output: Tensor,
    present_state: Tensor | None,
    *,
    reverse: bool = False,
    tile: SweepTile | None = None,
    plan: SweepPlan | None = None,
) -> None:
    """Launch one sweep into `output` [B, T, H, V] and `present_state` [B, H, K, V].

    Args:
        query, key: [B, T, H, K], float32, float16 or bfloat16.
        value: [B, T, H, V], same dtype.
        slope_rate: [H] float32.
        past_state: [B, H, K, V] float32 of any strides; before the first token, or after the last if `reverse`.
        lengths: [B] int32.
        output: Written wholly.
        present_state: Written if given; the state at the other end. Other memory than past_state's, which is read late.
        reverse: Carry the state from the last token to the first.
        tile: Sizes other than those of the rule.
        plan: Segments other than those of the rule.
    """
    B, T, H, _ = query.shape
    if B == 0 or H == 0:
        return
    if T == 0:
        if present_state is not None:
            present_state.copy_(past_state)
        return
    device = query.device
    if not is_current(device):
        with torch.cuda.device(device):
            sweep(
                query, key, value, slope_rate, past_state, lengths, output, present_state,
                reverse=reverse, tile=tile, plan=plan,
            )  # fmt: skip
        return
    slope_rate, lengths = slope_rate.contiguous(), lengths.contiguous()
    present = past_state if present_state is None else present_state
    cut = sweep_cut(
        query.shape,
        value.shape[3],
        (query.stride(), key.stride(), value.stride(), output.stride(), past_state.stride(), present.stride()),
        query.dtype,
        device,
        reverse,
        present_state is not None,
        tile,
        plan,
    )
    if cut.needs_copies or (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15:
        sweep(
            _dense_rows(query), _dense_rows(key), _dense_rows(value), slope_rate, _near(past_state), lengths, output,
            present_state, reverse=reverse, tile=tile, plan=plan,
        )  # fmt: skip
        return
    states = (slope_rate, past_state, lengths)
    if cut.hopper is None:
        _launch(cut, (query, key, value, *states, output, present), (*states, present), past_state, lengths)
    else:
        buffers = _handover_buffers(cut, past_state, lengths)
        try:
            cut.hopper((query, key, value, output), (output, *states, present, *buffers))
        except KernelUnavailable as error:
            leave_out_hopper(error)
            sweep(query, key, value, slope_rate, past_state, lengths, output, present_state, reverse=reverse, plan=plan)


def sweep_back(
    inputs: tuple[Tensor, ...],
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    *,
    tile: SweepTile | None = None,
    plan: SweepPlan | None = None,
) -> int:
    """Launch those sweeps of a backward that have the same sizes as one, where there is a kernel for that.

    Args:
        inputs: Query, key, value, grad_output, slope_rate, past_state, grad_state and lengths, as for the backward; the
            first four as `_dense_rows` returns them.
        results: The gradients of query, key, value and past_state, dense; the last one may be absent.
        tile: Sizes other than those of the rule.
        plan: Segments other than those of the rule.

    Returns:
        3 if all results are written, 2 if those of query and key are, 0 if none.
    """
    query, key, value, grad_output, slope_rate, past_state, grad_state, lengths = inputs
    device = query.device
    if capability(device) != 90 or query.numel() == 0:
        return 0
    if not is_current(device):
        with torch.cuda.device(device):
            return sweep_back(inputs, results, tile=tile, plan=plan)
    slope_rate, lengths = slope_rate.contiguous(), lengths.contiguous()
    strides = tuple([x.stride() for x in (query, key, value, grad_output, past_state, grad_state)])
    *gradients, d_state = results
    cut = backward_cut(query.shape, value.shape[3], strides, query.dtype, device, d_state is not None, tile, plan)
    if cut is None:
        return 0
    assert cut.hopper is not None
    written = past_state if d_state is None else d_state
    buffers = _handover_buffers(cut, past_state, lengths)
    others = (*gradients, slope_rate, past_state, grad_state, lengths, written, *buffers)
    try:
        cut.hopper((query, key, value, grad_output, *gradients), others)
    except KernelUnavailable as error:
        leave_out_hopper(error)
        return 0
    return sweeps_at_once(query.shape[3], value.shape[3])


def _launch(
    cut: Cut, tensors: tuple[Tensor, ...], anywhere: tuple[Tensor, ...], past_state: Tensor, lengths: Tensor
) -> None:
    """Launch a kernel on `tensors` and the look-back's buffers.

    Args:
        anywhere: Those of the tensors that need not start at a multiple of 16 bytes, which Triton compiles for.
        past_state, lengths: Stand for the buffers where there is no look-back.
    """
    carry, progress = _handover_buffers(cut, past_state, lengths)
    misalignment = tuple([x.data_ptr() % 16 for x in anywhere])
    allocate_with_torch()
    arguments = (*tensors, carry, progress, *cut.numbers)
    launch(cut.kernel, (cut, misalignment), cut.grid, arguments, cut.constants, cut.warps)


def _handover_buffers(cut: Cut, past_state: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the look-back's buffers for states and counters; the arguments stand for them where there is none."""
    if not cut.carry:
        return past_state, lengths
    return handover_memory(cut.carry, cut.progress, lengths.device)


def _near(state: Tensor) -> Tensor:
    """Give a state as it is where 32 bits reach all of a head's numbers; else a copy."""
    return state if state_fits(state.shape, state.stride()) else state.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense_rows(x: Tensor) -> Tensor:
    """X itself where its rows are dense and start at multiples of 16 bytes, as tensor maps want it; else a copy."""
    if rows_fit(x.shape, x.stride(), x.element_size()) and not x.data_ptr() & 15:
        return x
    return x.clone(memory_format=torch.contiguous_format)
