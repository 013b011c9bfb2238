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

from tnllm_export.kernels.cuda_driver import TensorMap
from tnllm_export.kernels.lightning_attention.hopper_launch import HopperLaunch, KernelUnavailable, map_of
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
    if cut.needs_copies or (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15:
        sweep(
            _dense_rows(query), _dense_rows(key), _dense_rows(value), slope_rate, past_state, lengths, output,
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
            _leave_out_hopper(error)
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
    cut = _backward_cut(query.shape, value.shape[3], strides, query.dtype, device, d_state is not None, tile, plan)
    if cut is None:
        return 0
    assert cut.hopper is not None
    written = past_state if d_state is None else d_state
    buffers = _handover_buffers(cut, past_state, lengths)
    others = (*gradients, slope_rate, past_state, grad_state, lengths, written, *buffers)
    try:
        cut.hopper((query, key, value, grad_output, *gradients), others)
    except KernelUnavailable as error:
        _leave_out_hopper(error)
        return 0
    return _sweeps_at_once(query.shape[3], value.shape[3])


def _sweeps_at_once(K: int, V: int) -> int:
    """Sweeps of a backward that have the same sizes: for query and key states are [V, K], for value [K, V]."""
    return 3 if K == V else 2


@dataclass(frozen=True, eq=False)
class _Cut:
    """All of a launch that follows from sizes, strides and dtype; one object for each, which is its own key."""

    grid: tuple[int, int, int]
    carry: int
    """Numbers in the look-back's buffer for states."""
    progress: int
    """Of its counters."""
    needs_copies: bool = False
    """Whether rows of query, key or value lie as no kernel takes them; nothing else is known then."""
    hopper: HopperLaunch | None = None
    """For the kernels for Hopper, all else; for the portable one, what follows."""
    kernel: Any = None
    numbers: tuple[int, ...] = ()
    constants: tuple[Any, ...] = ()
    warps: int = 0


def _launch(
    cut: _Cut, tensors: tuple[Tensor, ...], anywhere: tuple[Tensor, ...], past_state: Tensor, lengths: Tensor
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


def _handover_buffers(cut: _Cut, past_state: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the look-back's buffers for states and counters; the arguments stand for them where there is none."""
    if not cut.carry:
        return past_state, lengths
    device = lengths.device
    return torch.empty(cut.carry, dtype=torch.float32, device=device), zero_counters(cut.progress, device)


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
    values = torch.Size((B, T, H, V))
    *activations, past, present = strides
    read = zip((shape, shape, values), activations, strict=False)
    if not all(_rows_fit(x, stride, dtype.itemsize) for x, stride in read):
        return _Cut(grid=(0, 0, 0), carry=0, progress=0, needs_copies=True)
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
    kind = {"REVERSE": reverse, "HANDOVER": plan.handover, "STORE_STATE": store_state}
    if tile.kernel == "hopper":
        maps = [map_of(x, stride) for x, stride in zip((shape, shape, values, values), activations, strict=True)]
        b, t, h, _ = activations[3]
        numbers = {"T": T, "H": H, "output_stride_b": b, "output_stride_t": t, "output_stride_h": h}
        states = {"past": past, "present": present}
        constants = {"K": K, "V": V, "PARTS": tile.parts, **kind}
        return _hopper_cut(_hopper_kernel(), constants, maps, numbers, states, K, columns, tile, plan, device)
    sizes = K, V, key_block(K), tile.value_block, tile.chunk
    return _Cut(
        kernel=sweep_kernel,
        numbers=(T, H, *(n for stride in activations for n in stride[:3]), *past, *present),
        constants=(*sizes, *kind.values(), tile.state_stages, tile.stages),
        warps=tile.warps,
        **_grid(K, columns, tile, plan),
    )


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
    *activations, past, grad_state = strides
    values = torch.Size((B, T, H, V))
    # Gradients are dense.
    results = [(T * H * D, H * D, D, 1) for D in (K, K, V)]
    shapes = (shape, shape, values, values, shape, shape, values)
    maps = [map_of(x, stride) for x, stride in zip(shapes, (*activations, *results), strict=True)]
    numbers = {"T": T, "H": H, "stores_grad_past": int(store_state)}
    states = {"past": past, "grad_state": grad_state}
    constants = {"K": K, "V": V, "PARTS": tile.parts, "SWEEPS": sweeps, "HANDOVER": plan.handover}
    return _hopper_cut(backward_hopper_kernel, constants, maps, numbers, states, V, columns, tile, plan, device)


def _hopper_cut(
    kernel: Any,
    constants: dict[str, Any],
    maps: list[TensorMap],
    numbers: dict[str, int],
    states: dict[str, tuple[int, ...]],
    rows: int,
    columns: int,
    tile: SweepTile,
    plan: SweepPlan,
    device: torch.device,
) -> _Cut:
    """Return a launch of `columns` walks of a kernel for Hopper, whose states have so many rows.

    Args:
        kernel, constants, maps: As for `HopperLaunch`.
        numbers: Arguments but strides.
        states: Strides by name.
    """
    strides = {
        f"{name}_stride_{axis}": n for name, stride in states.items() for axis, n in zip("bhkv", stride, strict=True)
    }
    grid = _grid(rows, columns, tile, plan)
    return _Cut(hopper=HopperLaunch(kernel, constants, grid["grid"], maps, numbers | strides, device), **grid)


def _grid(rows: int, columns: int, tile: SweepTile, plan: SweepPlan) -> dict[str, Any]:
    """Return the fields of a `_Cut` that say how many programs there are and what they hand over."""
    states = columns * plan.segments if plan.handover == "lookback" else 0
    return {
        "grid": (columns, plan.segments, 1),
        "carry": states * key_block(rows) * tile.value_block,
        "progress": states + 1 if states else 0,
    }


_left_out: list[Exception] = []
"""Why the kernels for Hopper are left out."""


@cache
def _hopper_kernel() -> Any:
    """None where this Triton's Gluon is not one that the kernel is written for."""
    try:
        from tnllm_export.kernels.lightning_attention.sweep_hopper import sweep_hopper_kernel  # noqa: PLC0415
    except (ImportError, AttributeError) as error:
        _leave_out_hopper(error)
    return None if _left_out else sweep_hopper_kernel


def _leave_out_hopper(error: Exception) -> None:
    """From now on take the portable kernel, which is slower, and say so once."""
    if not _left_out:
        warnings.warn(f"the kernels for Hopper are left out, which costs time: {error}", stacklevel=4)
    _left_out.append(error)
    for known in (_hopper_kernel, _cut, _backward_cut):
        known.cache_clear()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense_rows(x: Tensor) -> Tensor:
    """X itself where its rows are dense and start at multiples of 16 bytes, as tensor maps want it; else a copy."""
    if _rows_fit(x.shape, x.stride(), x.element_size()) and not x.data_ptr() & 15:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _rows_fit(shape: tuple[int, ...], strides: tuple[int, ...], element_size: int) -> bool:
    """Whether rows are dense, and all at multiples of 16 bytes from the first one."""
    b, t, h, d = strides
    B, T, H, D = shape
    # Rows that overlap (an expanded gradient) are left to nobody's interpretation of a stride of 0.
    apart = (b >= D or B == 1) and (t >= D or T == 1) and (h >= D or H == 1)
    return d == 1 and apart and not (b | t | h) * element_size & 15
