"""How one launch of a sweep is made of its sizes, strides and dtype: which kernel, how it is cut, what it is told.

It is found out once for each and kept.
"""

import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from tnllm_export.kernels.cuda_driver import TensorMap
from tnllm_export.kernels.lightning_attention.hopper_launch import HopperLaunch, map_of
from tnllm_export.kernels.lightning_attention.launch import capability, processors
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


@dataclass(frozen=True, eq=False)
class Cut:
    """All of a launch that follows from sizes, strides and dtype; one object for each, which is its own key."""

    grid: tuple[int, int, int]
    carry: int
    """Numbers in the look-back's buffer for states."""
    progress: int
    """Of its counters."""
    needs_copies: bool = False
    """Whether rows of query, key or value, or a state, lie as no kernel takes them; nothing else is known then."""
    hopper: HopperLaunch | None = None
    """For the kernels for Hopper, all else; for the portable one, what follows."""
    kernel: Any = None
    numbers: tuple[int, ...] = ()
    constants: tuple[Any, ...] = ()
    warps: int = 0


@lru_cache(maxsize=1024)
def sweep_cut(
    shape: torch.Size,
    V: int,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    reverse: bool,
    store_state: bool,
    tile: SweepTile | None,
    plan: SweepPlan | None,
) -> Cut:
    """Return the launch of one sweep.

    Args:
        shape: Of query and key, [B, T, H, K].
        V: Columns of a value.
        strides: Of query, key, value, output, past_state and present_state.
        dtype: Of activations.
        device: Where they lie; it is current.
        reverse: Whether the state goes from the last token to the first.
        store_state: Whether present_state is written.
        tile: Sizes other than those of the rule.
        plan: Segments other than those of the rule.
    """
    B, T, H, K = shape
    values = torch.Size((B, T, H, V))
    *activations, past, present = strides
    read = zip((shape, shape, values), activations, strict=False)
    fit = all(rows_fit(x, stride, dtype.itemsize) for x, stride in read)
    if not fit or not state_fits((B, H, K, V), past):
        return Cut(grid=(0, 0, 0), carry=0, progress=0, needs_copies=True)
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
    return Cut(
        kernel=sweep_kernel,
        numbers=(T, H, *(n for stride in activations for n in stride[:3]), *past, *present),
        constants=(*sizes, *kind.values(), tile.state_stages, tile.stages),
        warps=tile.warps,
        **_grid(K, columns, tile, plan),
    )


@lru_cache(maxsize=1024)
def backward_cut(
    shape: torch.Size,
    V: int,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    store_state: bool,
    tile: SweepTile | None,
    plan: SweepPlan | None,
) -> Cut | None:
    """Return the one launch of the sweeps of a backward that have the same sizes; None if no kernel does them.

    Args:
        strides: Of query, key, value and grad_output, whose rows fit (see `rows_fit`), past_state and grad_state.
        store_state: Whether the gradient of past_state is written.
        shape, V, dtype, device, tile, plan: As for `sweep_cut`.
    """
    B, T, H, K = shape
    # States are [V, K] here.
    tiles = hopper_tiles(V, K, _ACTIVATIONS[dtype]) if tile is None else (tile,)
    if not tiles or _hopper_kernel() is None:
        return None
    from tnllm_export.kernels.lightning_attention.backward_hopper import backward_hopper_kernel  # noqa: PLC0415

    sweeps = sweeps_at_once(K, V)
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
) -> Cut:
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
    return Cut(hopper=HopperLaunch(kernel, constants, grid["grid"], maps, numbers | strides, device), **grid)


def _grid(rows: int, columns: int, tile: SweepTile, plan: SweepPlan) -> dict[str, Any]:
    """Return the fields of a `Cut` that say how many programs there are and what they hand over."""
    states = columns * plan.segments if plan.handover == "lookback" else 0
    return {
        "grid": (columns, plan.segments, 1),
        "carry": states * key_block(rows) * tile.value_block,
        "progress": states + 1 if states else 0,
    }


def sweeps_at_once(K: int, V: int) -> int:
    """Sweeps of a backward that have the same sizes: for query and key states are [V, K], for value [K, V]."""
    return 3 if K == V else 2


_left_out: list[Exception] = []
"""Why the kernels for Hopper are left out."""


@cache
def _hopper_kernel() -> Any:
    """None where this Triton's Gluon is not one that the kernel is written for."""
    try:
        from tnllm_export.kernels.lightning_attention.sweep_hopper import sweep_hopper_kernel  # noqa: PLC0415
    except (ImportError, AttributeError) as error:
        leave_out_hopper(error)
    return None if _left_out else sweep_hopper_kernel


def leave_out_hopper(error: Exception) -> None:
    """From now on take the portable kernel, which is slower, and say so once."""
    if not _left_out:
        warnings.warn(f"the kernels for Hopper are left out, which costs time: {error}", stacklevel=4)
    _left_out.append(error)
    for known in (_hopper_kernel, sweep_cut, backward_cut):
        known.cache_clear()


def state_fits(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether 32 bits reach from a head's first number of a state [B, H, K, V] to its last one."""
    *_, K, V = shape
    *_, row, column = strides
    return (K - 1) * row + (V - 1) * column < 1 << 31


def rows_fit(shape: tuple[int, ...], strides: tuple[int, ...], element_size: int) -> bool:
    """Whether rows are dense, and all at multiples of 16 bytes from the first one."""
    b, t, h, d = strides
    B, T, H, D = shape
    # Rows that overlap (an expanded gradient) are left to nobody's interpretation of a stride of 0.
    apart = (b >= D or B == 1) and (t >= D or T == 1) and (h >= D or H == 1)
    return d == 1 and apart and not (b | t | h) * element_size & 15
