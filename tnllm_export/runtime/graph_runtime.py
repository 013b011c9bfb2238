"""What runtimes on PyTorch's tensors share: states on one device, and decode as CUDA graphs where it is a GPU."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tnllm_export.runtime.ahead import Underway
from tnllm_export.runtime.decode_graphs import DecodeGraphs, GraphState
from tnllm_export.runtime.device_memory import reporting_out_of_memory
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import (
    check_batch,
    check_handle,
    check_state_tensors,
    select_sequences,
    state_shapes,
    zero_state,
)
from tnllm_export.runtime.validation import check_decode, check_decode_ahead


class GraphRuntime(ABC):
    """Owns states, and decodes by graphs where it has some; a subclass adds prefill, and decode without a graph."""

    def __init__(
        self, info: RuntimeInfo, device: torch.device, graphs: DecodeGraphs | None, state_dtype: torch.dtype
    ) -> None:
        """Make a runtime.

        Args:
            info: What is loaded.
            device: Of states and logits.
            graphs: The captured steps, where `info.runs_ahead`.
            state_dtype: The dtype of states.
        """
        self._info = info
        self._device = device
        self._graphs = graphs
        self._state_dtype = state_dtype
        self._state_shapes = state_shapes(info.config)

    @property
    def info(self) -> RuntimeInfo:
        """What is loaded."""
        return self._info

    def initial_state(self, batch: int) -> State:
        """Return the all-zero state of `batch` sequences."""
        check_batch(batch)
        with reporting_out_of_memory(self._device, f"a state of {batch} sequences", "take fewer at once"):
            return GraphState(self, zero_state(self._state_shapes, batch, self._state_dtype, self._device))

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, 1] and consume `state`; see `Runtime.decode`. Raises DeviceMemoryError as prefill does."""
        check_decode(self._info.config.vocab_size, input_ids, positions)
        handle = cast(GraphState, check_handle(self, state, input_ids.shape[0]))
        if self._graphs is not None:
            return self._graphs.decode(input_ids, positions, handle)
        logits, present = self._decode_uncaptured(input_ids, positions, handle.tensors)
        handle.consumed = True
        return logits, GraphState(self, present)

    @abstractmethod
    def _decode_uncaptured(
        self, input_ids: Tensor, positions: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed one token, where there are no graphs; return logits and the new state."""

    @torch.inference_mode()
    def decode_ahead(self, input_ids: Tensor | None, positions: Tensor | None, state: State) -> tuple[Underway, State]:
        """Enqueue a step and a choice without waiting, where steps are captured; see `RunsAhead.decode_ahead`."""
        check_decode_ahead(self._info, input_ids, positions)
        handle = cast(GraphState, check_handle(self, state, None if input_ids is None else len(input_ids)))
        assert self._graphs is not None
        return self._graphs.decode_ahead(input_ids, positions, handle)

    @torch.inference_mode()
    def select(self, state: State, places: Sequence[int]) -> State:
        """Copy some sequences of a state on its device; see `RunsAhead.select`."""
        return GraphState(self, select_sequences(check_handle(self, state, None).tensors, places))

    def host_state(self, state: State) -> list[Tensor]:
        """Copy a state to the host: one [B, H, K, V] per layer."""
        return [tensor.detach().to("cpu", copy=True) for tensor in check_handle(self, state, None).tensors]

    def device_state(self, tensors: list[Tensor]) -> State:
        """Copy host tensors into a new state."""
        check_state_tensors(self._info.config, tensors, self._state_dtype)
        with reporting_out_of_memory(self._device, "a state", "let go of states that are not needed any more"):
            return GraphState(self, [tensor.detach().contiguous().to(self._device, copy=True) for tensor in tensors])
