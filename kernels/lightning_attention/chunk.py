"""The chunk op and its gradients by Triton: four sweeps (see `sweep.py`).

With G_t the gradient of the state after token t, which decays backwards in time as the state does forwards,

    output     o_t  = q_tᵀ S_t,   S_t = exp(-s) S_{t-1} + k_t v_tᵀ      forward,  (q, k, v; S)
    query      dq_t = do_tᵀ S_tᵀ                                          forward,  (do, v, k; Sᵀ)
    key        dk_t = v_tᵀ G_tᵀ,  G_t = exp(-s) G_{t+1} + q_t do_tᵀ     reverse,  (v, do, q; Gᵀ)
    value      dv_t = k_tᵀ G_t                                            reverse,  (k, q, do; G)

so each is the same sweep over other tensors, and nothing but the inputs is kept for the backward. On Hopper those of
the last three that have the same sizes are one launch (see `backward_hopper.py`).
"""

import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from tnllm_export.kernels.lightning_attention.launch import (
    allocate_with_torch,
    capability,
    is_current,
    launch,
    processors,
    zero_counters,
)
from tnllm_export.kernels.lightning_attention.sweep import sweep_kernel
from tnllm_export.kernels.lightning_attention.sweep_plan import (
    Activation,
    SweepPlan,
    SweepTile,
    hopper_tiles,
    key_block,
    sweep_plan,
    sweep_tile,
    sweep_tiles,
)

_ACTIVATIONS: dict[torch.dtype, Activation] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


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
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    slope_rate, lengths = slope_rate.contiguous(), lengths.contiguous()
    present = past_state if present_state is None else present_state
    cut = _cut(
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
    states = (slope_rate, past_state, lengths)
    _launch(cut, (query, key, value, *states, output, present), (*states, present), past_state, lengths)


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
    cut = _backward_cut(query.shape, value.shape[3], strides, query.dtype, device, d_state is not None, tile, plan)
    if cut is None:
        return 0
    states = (slope_rate, past_state, grad_state, lengths)
    written = past_state if d_state is None else d_state
    _launch(cut, (query, key, value, grad_output, *states, *gradients, written), states, past_state, lengths)
    return _sweeps_at_once(query.shape[3], value.shape[3])


def _sweeps_at_once(K: int, V: int) -> int:
    """Sweeps of a backward that have the same sizes: for query and key states are [V, K], for value [K, V]."""
    return 3 if K == V else 2


@dataclass(frozen=True, eq=False)
class _Cut:
    """All of a launch that follows from sizes, strides and dtype; one object for each, which is its own key."""

    kernel: Any
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    warps: int
    carry: int
    progress: int


def _launch(
    cut: _Cut, tensors: tuple[Tensor, ...], anywhere: tuple[Tensor, ...], past_state: Tensor, lengths: Tensor
) -> None:
    """Launch a kernel on `tensors` and the look-back's buffers.

    Args:
        anywhere: Those of the tensors that need not start at a multiple of 16 bytes, which Triton compiles for.
        past_state, lengths: Stand for the buffers where there is no look-back.
    """
    device = lengths.device
    carry = torch.empty(cut.carry, dtype=torch.float32, device=device) if cut.carry else past_state
    progress = zero_counters(cut.progress, device) if cut.progress else lengths
    misalignment = tuple([x.data_ptr() % 16 for x in anywhere])
    allocate_with_torch()
    arguments = (*tensors, carry, progress, *cut.numbers)
    launch(cut.kernel, (cut, misalignment), cut.grid, arguments, cut.constants, cut.warps)


@lru_cache(maxsize=1024)
def _cut(
    shape: torch.Size,
    V: int,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    reverse: bool,
    store_state: bool,
    tile: SweepTile | None,
    plan: SweepPlan | None,
) -> _Cut:
    B, T, H, K = shape
    activation = _ACTIVATIONS[dtype]
    if tile is not None:
        tiles: tuple[SweepTile, ...] = (tile,)
    elif capability(device) == 90 and _hopper_kernel() is None:
        tiles = (sweep_tile(K, V, activation, 90),)
    else:
        tiles = sweep_tiles(K, V, activation, capability(device))
    tile, chosen = sweep_plan(tiles, B * H, V, T, processors(device))
    plan = plan or chosen
    columns = B * H * -(-V // tile.value_block)
    kernel = sweep_kernel if tile.kernel == "portable" else _hopper_kernel()
    constants = _constants(K, V, tile, plan, reverse, store_state)
    return _cut_of(kernel, constants, (T, H), K, strides, columns, tile, plan)


@lru_cache(maxsize=1024)
def _backward_cut(
    shape: torch.Size,
    V: int,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    store_state: bool,
    tile: SweepTile | None,
    plan: SweepPlan | None,
) -> _Cut | None:
    B, T, H, K = shape
    # States are [V, K] here.
    tiles = hopper_tiles(V, K, _ACTIVATIONS[dtype]) if tile is None else (tile,)
    if not tiles or _hopper_kernel() is None:
        return None
    from tnllm_export.kernels.lightning_attention.backward_hopper import backward_hopper_kernel  # noqa: PLC0415

    sweeps = _sweeps_at_once(K, V)
    tile, chosen = sweep_plan(tiles, sweeps * B * H, K, T, processors(device))
    plan = plan or chosen
    columns = sweeps * B * H * (K // tile.value_block)
    numbers = T, H, int(store_state)
    constants = K, V, tile.parts, sweeps, plan.handover
    return _cut_of(backward_hopper_kernel, constants, numbers, V, strides, columns, tile, plan)


def _cut_of(
    kernel: Any,
    constants: tuple[Any, ...],
    numbers: tuple[int, ...],
    rows: int,
    strides: tuple[tuple[int, ...], ...],
    columns: int,
    tile: SweepTile,
    plan: SweepPlan,
) -> _Cut:
    """Return the launch of `columns` walks.

    Args:
        numbers: Arguments before the strides.
        rows: Of a state.
        strides: Of the activations, then of two states.
    """
    states = columns * plan.segments if plan.handover == "lookback" else 0
    *activations, first_state, second_state = strides
    return _Cut(
        kernel=kernel,
        grid=(columns, plan.segments, 1),
        numbers=(*numbers, *(n for stride in activations for n in stride[:3]), *first_state, *second_state),
        constants=constants,
        warps=tile.warps,
        carry=states * key_block(rows) * tile.value_block,
        progress=states + 1 if states else 0,
    )


def _constants(K: int, V: int, tile: SweepTile, plan: SweepPlan, reverse: bool, store_state: bool) -> tuple[Any, ...]:
    if tile.kernel == "hopper":
        return K, V, tile.parts, reverse, plan.handover, store_state
    sizes = K, V, key_block(K), tile.value_block, tile.chunk
    return *sizes, reverse, plan.handover, store_state, tile.state_stages, tile.stages


@cache
def _hopper_kernel() -> Any:
    """None where this Triton's Gluon is not the one that the kernel is written for."""
    try:
        from tnllm_export.kernels.lightning_attention.sweep_hopper import sweep_hopper_kernel  # noqa: PLC0415
    except (ImportError, AttributeError) as error:
        warnings.warn(f"the kernel for Hopper is left out, which costs time: {error}", stacklevel=2)
        return None
    return sweep_hopper_kernel


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense_rows(x: Tensor) -> Tensor:
    """X itself where its rows are dense and start at multiples of 16 bytes, as tensor maps want it; else a copy."""
    b, t, h, d = x.stride()
    size = x.element_size()
    # Rows that overlap (an expanded gradient) are left to nobody's interpretation of a stride of 0.
    if d == 1 and not ((b | t | h) * size | x.data_ptr()) & 15 and (t >= x.shape[3] or x.shape[1] == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)
