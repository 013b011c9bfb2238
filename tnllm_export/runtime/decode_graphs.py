"""Decode as CUDA graphs that update a state in place.

A graph is bound to the addresses of its inputs and of its state. So there is one graph for each number of sequences,
with a state of its own, and a caller's state is copied into it when it is decoded for the first time. From then on it
lives there, and a step moves no state but the one that the kernels read and write. When another state of as many
sequences is decoded, the one that lives there moves out to memory of its own, if anybody still holds it: two sequences
decoded in turns cost two copies of a state per step (0.06 ms for the 65 MB of the 7B model, on an H200).
"""

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from tnllm_export.kernels.dispatch import Choice, kernel_choice
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.fused_decode import FusedDecoder
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime.cuda_graphs import Capture, CudaCapture, Staging, on_device
from tnllm_export.runtime.device_memory import gibibytes, reporting_out_of_memory
from tnllm_export.runtime.state import StateHandle

MOST_GRAPHS = 4
"""Graphs that are kept; the one that was not used for longest goes first."""

ROW_STEP = 8
"""Above so many sequences, graphs are made for multiples of it."""


STEPS_AHEAD = 4
"""Steps that may be under way before a caller waits."""


class Stateful(Protocol):
    """What graphs have to know of a model: the shape of its states, and where they are."""

    config: TransnormerConfig

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of states."""

    def initial_state(self, batch: int) -> list[Tensor]:
        """Return the all-zero state of each layer, [B, H, K, V]."""


Step = Callable[[Tensor, Tensor, list[Tensor]], Tensor]
"""input_ids [B, 1], positions [B] and a state, which it updates in place -> logits [B, vocab]."""


class GraphState(StateHandle):
    """A state that remembers the graph in which it lives, if it does."""

    __slots__ = ("__weakref__", "graph")

    def __init__(self, owner: object, tensors: Sequence[Tensor], graph: "DecodeGraph | None" = None) -> None:
        super().__init__(owner, tensors)
        self.graph = graph


class DecodeGraphs:
    """The decode steps of one model, captured for the numbers of sequences that are asked for.

    Memory, beside weights and the callers' states: each graph has a state of its own for `graph_batch(B)` sequences and
    the activations of one token, and there are at most MOST_GRAPHS.
    """

    def __init__(
        self, model: Stateful, capture: Capture | None = None, make_step: Callable[[int], Step] | None = None
    ) -> None:
        """Make a set of graphs.

        Args:
            model: Its device decides where all tensors are.
            capture: Captures a call whose inputs and outputs stay where they are; default: as a CUDA graph.
            make_step: Returns the step for a number of sequences; default: that of `model`, a `TransnormerForCausalLM`.
        """
        self._model = model
        self._device = model.device
        self._make_step = make_step or partial(decode_step, cast(TransnormerForCausalLM, model))
        self._capture = capture or CudaCapture(self._device)
        self._graphs: OrderedDict[tuple[int, Choice], DecodeGraph] = OrderedDict()

    def decode(self, input_ids: Tensor, positions: Tensor, state: GraphState) -> tuple[Tensor, GraphState]:
        """Feed one token, input_ids [B, 1] and positions [B], which were checked, and consume `state`.

        Whatever can fail, memory above all, comes before anything is enqueued that changes the state.

        Returns:
            Logits [B, vocab] on the device, and the new state.

        Raises:
            DeviceMemoryError: The GPU's memory does not suffice.
            RuntimeTargetError: The step could not be captured.
        """
        with on_device(self._device):
            graph = self._graph(state.batch)
            with reporting_out_of_memory(self._device, "decode", "let go of states that are not needed any more"):
                answer = graph.empty_answer(state.batch)
                graph.admit(state)
            graph.run(input_ids, positions, answer)
            tensors, state.tensors, state.consumed = state.tensors, (), True
            new = GraphState(state.owner, tensors if state.graph is graph else graph.rows(len(answer)), graph)
            graph.occupant = weakref.ref(new)
        return answer, new

    def _graph(self, batch: int) -> "DecodeGraph":
        key = (graph_batch(batch), kernel_choice())
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= MOST_GRAPHS:
                self._graphs.popitem(last=False)[1].close()
            graph = self._graphs[key] = self._make(key[0])
        self._graphs.move_to_end(key)
        return graph

    def _make(self, batch: int) -> "DecodeGraph":
        shapes = [self._model.config.state_shape(layer, batch) for layer in range(self._model.config.decoder_layers)]
        size = sum(torch.Size(shape).numel() for shape in shapes) * self._model.state_dtype.itemsize
        work = f"the CUDA graph of decode for {batch} sequences, whose state alone takes {gibibytes(size)}"
        way_out = "decode fewer sequences at once, or let go of states that are not needed any more"
        with reporting_out_of_memory(self._device, work, way_out):
            return DecodeGraph(self._model, self._make_step(batch), batch, self._capture)


class DecodeGraph:
    """One captured step, its state, and its inputs, which come through pinned memory.

    It is made on a state of zeros: a caller's comes in when all is ready.
    """

    def __init__(self, model: Stateful, step: Step, batch: int, capture: Capture) -> None:
        device = model.device
        on_gpu = device.type == "cuda"
        self.occupant: weakref.ref[GraphState] | None = None
        self._states = model.initial_state(batch)
        # Token ids and positions: one copy brings both.
        self._inputs = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._staging = deque(Staging((2, batch), on_gpu) for _ in range(STEPS_AHEAD))
        self._step = step  # a captured call keeps none of its buffers alive
        input_ids, positions = self._inputs[0].unsqueeze(1), self._inputs[1]
        self._captured = capture(lambda: step(input_ids, positions, self._states))

    def rows(self, batch: int) -> tuple[Tensor, ...]:
        """The first `batch` sequences of the state."""
        return tuple(state[:batch] for state in self._states)

    def empty_answer(self, batch: int) -> Tensor:
        """Memory for the logits of one step, [batch, vocab]."""
        return torch.empty_like(self._captured.logits[:batch])

    def admit(self, state: GraphState) -> None:
        """Bring a state in; the one that lives here moves out first. Nothing is changed where memory is short."""
        if state.graph is self:
            return
        occupant = self._living()
        if occupant is not None:
            occupant.tensors = tuple(tensor.clone() for tensor in occupant.tensors)
            occupant.graph = None
        self.occupant = None
        B = state.batch
        torch._foreach_copy_(list(self.rows(B)), list(state.tensors))
        if len(self._states[0]) > B:
            for own in self._states:
                own[B:].zero_()

    def run(self, input_ids: Tensor, positions: Tensor, answer: Tensor) -> None:
        """Step the state that was admitted, and write logits [B, vocab] into `answer`, without waiting."""
        B = len(answer)
        if input_ids.is_cpu and positions.is_cpu:
            staged = self._staging[0].numbers()
            staged[0, :B] = input_ids.numpy()[:, 0]
            staged[1, :B] = positions.numpy()
            self._staging[0].send(self._inputs)
            self._staging.rotate(-1)
        else:
            self._inputs[0, :B] = input_ids.squeeze(1)
            self._inputs[1, :B] = positions
        self._captured.replay()
        answer.copy_(self._captured.logits[:B])

    def close(self) -> None:
        """Leave the state to whom it belongs: this graph will not run again."""
        occupant = self._living()
        if occupant is not None:
            occupant.graph = None

    def _living(self) -> GraphState | None:
        occupant = None if self.occupant is None else self.occupant()
        return None if occupant is None or occupant.consumed or occupant.graph is not self else occupant


def graph_batch(batch: int) -> int:
    """Sequences of the graph that decodes `batch` ones: a power of two up to 8, then a multiple of 8.

    The rest of the rows is padding. A batch whose sequences end one by one so needs few graphs.
    """
    return 1 << (batch - 1).bit_length() if batch <= ROW_STEP else -(-batch // ROW_STEP) * ROW_STEP


def decode_step(model: TransnormerForCausalLM, batch: int) -> Step:
    """The quickest step in place that there is for this model, device and batch."""
    weight = model.lm_head.weight
    if FusedDecoder.unsupported(model.config, weight.dtype, weight.device, batch) is None:
        return FusedDecoder(model, batch).decode
    return model.decode_in_place
