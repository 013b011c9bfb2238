"""The handle behind a runtime's opaque `State`, the checks it must pass before it is used, and parts of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnllm_export.errors import StateError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.runtime.device_memory import reporting_out_of_memory


class StateHandle:
    """One recurrent state [B, H, K, V] per layer, the runtime that owns it, and whether decode has used it up."""

    __slots__ = ("consumed", "owner", "tensors")

    def __init__(self, owner: object, tensors: Sequence[Tensor]) -> None:
        self.owner = owner
        self.tensors = tuple(tensors)
        self.consumed = False

    @property
    def batch(self) -> int:
        """Number of sequences B."""
        return self.tensors[0].shape[0]


def check_handle(owner: object, state: Any, batch: int | None) -> StateHandle:
    """Return `state` as the live handle of `owner` for `batch` sequences (None: any number) or raise StateError."""
    if not isinstance(state, StateHandle):
        raise StateError(
            f"state is a {type(state).__name__}; expected one from initial_state, prefill, decode or device_state"
        )
    if state.owner is not owner:
        raise StateError(
            f"state was made by another runtime ({type(state.owner).__name__}); expected one of this "
            f"{type(owner).__name__}: convert it with host_state there and device_state here"
        )
    if state.consumed:
        raise StateError(
            "state was consumed by an earlier decode; expected the state which that decode returned "
            "(keep a copy with host_state before decode if you need the old one)"
        )
    if batch is not None and state.batch != batch:
        raise StateError(f"state has {state.batch} sequences; expected {batch}, as many as input_ids has rows")
    return state


def check_state_tensors(config: TransnormerConfig, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raise StateError unless there is one [B, H, K, V] tensor of `dtype` per layer, all of the same batch."""
    if len(tensors) != config.decoder_layers:
        raise StateError(f"state has {len(tensors)} layers; expected {config.decoder_layers}, the model's number")
    batch = tensors[0].shape[0] if tensors[0].dim() else 0
    if batch < 1:
        raise StateError(f"state of layer 0 has shape {list(tensors[0].shape)}; expected at least one sequence")
    for layer, tensor in enumerate(tensors):
        expected = config.state_shape(layer, batch)
        if tuple(tensor.shape) != expected:
            raise StateError(
                f"state of layer {layer} has shape {list(tensor.shape)}; expected {list(expected)}: "
                "use a state of the same model"
            )
        if tensor.dtype != dtype:
            raise StateError(f"state of layer {layer} is {_name(tensor.dtype)}; expected {_name(dtype)}")


def check_batch(batch: int) -> None:
    """Raise StateError unless a state can have `batch` sequences."""
    if batch < 1:
        raise StateError(f"batch is {batch}; expected at least 1 sequence")


def state_shapes(config: TransnormerConfig) -> list[tuple[int, ...]]:
    """Return the shape [H, K, V] of one sequence's state, layer by layer."""
    return [config.state_shape(layer, 1)[1:] for layer in range(config.decoder_layers)]


def zero_state(shapes: Sequence[tuple[int, ...]], batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return the all-zero state of each layer, [B, H, K, V], for the shapes of one sequence."""
    zeros = [torch.empty((batch, *shape), dtype=dtype, device=device) for shape in shapes]
    torch._foreach_zero_(zeros)  # a kernel or two, where each layer's own would take the host longer
    return zeros


def select_sequences(tensors: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Copy the sequences at these places of a state, on its device. Raises StateError, DeviceMemoryError."""
    batch, device = tensors[0].shape[0], tensors[0].device
    if not places or min(places) < 0 or max(places) >= batch:
        raise StateError(f"places are {list(places)}; expected at least one, each of 0 … {batch - 1}")
    with reporting_out_of_memory(device, "a state", "let go of states that are not needed any more"):
        index = torch.tensor(places, device=device)
        return [tensor.index_select(0, index) for tensor in tensors]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
