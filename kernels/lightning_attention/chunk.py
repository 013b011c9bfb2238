"""The chunk op and its gradients by Triton: four sweeps (see `sweep.py`).

With G_t the gradient of the state after token t, which decays backwards in time as the state does forwards,

    output     o_t  = q_tᵀ S_t,   S_t = exp(-s) S_{t-1} + k_t v_tᵀ      forward,  (q, k, v; S)
    query      dq_t = do_tᵀ S_tᵀ                                          forward,  (do, v, k; Sᵀ)
    key        dk_t = v_tᵀ G_tᵀ,  G_t = exp(-s) G_{t+1} + q_t do_tᵀ     reverse,  (v, do, q; Gᵀ)
    value      dv_t = k_tᵀ G_t                                            reverse,  (k, q, do; G)

so each is the same sweep over other tensors, and nothing but the inputs is kept for the backward.
"""

from typing import cast

import torch
import triton
from torch import Tensor

from tnllm_export.kernels.lightning_attention.sweep import sweep_kernel
from tnllm_export.kernels.lightning_attention.sweep_plan import Activation, SweepPlan, SweepTile, sweep_plan, sweep_tile

_ACTIVATIONS: dict[torch.dtype, Activation] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def lightning_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the chunk op. Args and results are those of `lightning_attention`."""
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    present_state = torch.empty(past_state.shape, dtype=past_state.dtype, device=past_state.device)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and past_state. Args are those of the blocked backward."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    d_state = torch.empty(past_state.shape, dtype=past_state.dtype, device=past_state.device)
    sweep(grad_output, value, key, slope_rate, past_state.mT, lengths, dq, None)
    sweep(value, grad_output, query, slope_rate, grad_state.mT, lengths, dk, None, reverse=True)
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
        present_state: Written if given; the state at the other end.
        reverse: Carry the state from the last token to the first.
        tile: Sizes other than those of the table.
        plan: Segments other than those of the rule.
    """
    query, key, value = (_with_dense_rows(x) for x in (query, key, value))
    B, T, H, K = query.shape
    V = value.shape[-1]
    if B == 0 or H == 0:
        return
    device = query.device
    tile = tile or sweep_tile(K, V, _ACTIVATIONS[query.dtype], _capability(device))
    blocks = -(-V // tile.value_block)
    columns = B * H * blocks
    plan = plan or sweep_plan(tile, columns, T, _processors(device))
    BK = max(1 << (K - 1).bit_length(), 16)
    chain = plan.handover == "chain"
    carry = torch.empty((2, columns, BK, tile.value_block) if chain else (1,), dtype=torch.float32, device=device)
    progress = torch.zeros(1 + columns if chain else 1, dtype=torch.int32, device=device) if chain else carry
    present = past_state if present_state is None else present_state
    # The kernel's tensor maps. Set for each launch: autograd runs a backward in a context of its own.
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device))
    sweep_kernel[(columns, plan.segments)](
        query,
        key,
        value,
        slope_rate,
        past_state,
        lengths,
        output,
        present,
        carry,
        progress,
        T,
        H,
        plan.segment_chunks,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *output.stride()[:3],
        *past_state.stride(),
        *present.stride(),
        K=K,
        V=V,
        BK=BK,
        BV=tile.value_block,
        C=tile.chunk,
        REVERSE=reverse,
        HANDOVER=plan.handover,
        STORE_STATE=present_state is not None,
        STATE_STAGES=tile.state_stages,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


def _with_dense_rows(x: Tensor) -> Tensor:
    """Rows of D elements must be dense and start at multiples of 16 bytes; what is not so is copied."""
    aligned = 16 // x.element_size()
    dense = x.stride(-1) == 1 and all(stride % aligned == 0 for stride in x.stride()[:3])
    return x if dense and x.data_ptr() % 16 == 0 else x.contiguous()


def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return cast(int, torch.cuda.get_device_properties(device).multi_processor_count)
