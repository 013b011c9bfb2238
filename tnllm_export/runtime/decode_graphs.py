"""Decode as CUDA graphs that update a state in place.

A graph is bound to the addresses of its inputs and of its state. So there is one graph for each number of sequences,
with a state of its own, and a caller's state is copied into it when it is decoded for the first time. From then on it
lives there, and a step moves no state but the one that the kernels read and write. When another state of as many
sequences is decoded, the one that lives there moves out to memory of its own, if anybody still holds it: two sequences
decoded in turns cost two copies of a state per step (0.06 ms for the 65 MB of the 7B model, on an H200).

For who runs ahead a step also writes the likeliest tokens, and their positions, where the next step reads its inputs:
then nothing has to come from the host between two steps.
"""

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from tnllm_export.errors import StateError
from tnllm_export.kernels.dispatch import Choice, kernel_choice
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.fused_decode import FusedDecoder
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime.ahead import HostCopy, Underway
from tnllm_export.runtime.cuda_graphs import Capture, Captured, CudaCapture, Staging, send_token
from tnllm_export.runtime.device_memory import gibibytes, reporting_out_of_memory
from tnllm_export.runtime.gpu import on_device
from tnllm_export.runtime.state import StateHandle

MOST_GRAPHS = 4
"""Graphs that are kept; the one that was not used for longest goes first."""

ROW_STEP = 8
"""Above so many sequences, graphs are made for multiples of it."""

STEPS_AHEAD = 4
"""Steps that may be under way before a caller waits."""

_LET_GO = "let go of states that are not needed any more"


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
    """A state that remembers the graph in which it lives, if it does.

    Attributes:
        graph: That graph.
        inputs: Token ids and positions of the next step, [2, rows] on the device, where a step chose them.
    """

    __slots__ = ("__weakref__", "graph", "inputs")

    def __init__(
        self,
        owner: object,
        tensors: Sequence[Tensor],
        graph: "DecodeGraph | None" = None,
        inputs: Tensor | None = None,
    ) -> None:
        super().__init__(owner, tensors)
        self.graph = graph
        self.inputs = inputs


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
            graph = self._graph(state.batch, ahead=False)
            with reporting_out_of_memory(self._device, "decode", _LET_GO):
                answer = graph.empty_answer(state.batch)
                graph.admit(state)
            graph.feed(input_ids, positions)
            graph.run(answer)
            return answer, graph.move_on(state, None)

    def decode_ahead(
        self, input_ids: Tensor | None, positions: Tensor | None, state: GraphState
    ) -> tuple[Underway, GraphState]:
        """Enqueue a step and the choice of the next tokens; see `RunsAhead.decode_ahead`. Fails as `decode` does."""
        if positions is None and state.inputs is None:
            raise StateError(
                "state has no step under way that chose its next token; expected one from decode_ahead, or input_ids "
                "and positions"
            )
        with on_device(self._device):
            graph = self._graph(state.batch, ahead=True)
            with reporting_out_of_memory(self._device, "decode", _LET_GO):
                choice = HostCopy(graph.choice)
                graph.admit(state)
            if positions is not None and input_ids is not None:
                graph.feed(input_ids, positions)
            elif input_ids is not None:
                graph.feed_chosen(input_ids, self._model.config.vocab_size)
            logits = graph.run_ahead(state.batch)
            return Underway(logits, choice.start(graph.choice)), graph.move_on(state, graph.inputs)

    def _graph(self, batch: int, *, ahead: bool) -> "DecodeGraph":
        key = (graph_batch(batch), kernel_choice())
        graph = self._graphs.get(key)
        if graph is None or not graph.is_captured(ahead=ahead):
            graph = self._captured(key, graph, ahead=ahead)
        self._graphs.move_to_end(key)
        return graph

    def _captured(self, key: tuple[int, Choice], graph: "DecodeGraph | None", *, ahead: bool) -> "DecodeGraph":
        batch = key[0]
        size = self._model.config.state_elements(batch) * self._model.state_dtype.itemsize
        work = f"the CUDA graph of decode for {batch} sequences, whose state alone takes {gibibytes(size)}"
        way_out = "decode fewer sequences at once, or let go of states that are not needed any more"
        while graph is None and len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)[1].close()
        with reporting_out_of_memory(self._device, work, way_out):
            graph = graph or DecodeGraph(self._model, self._make_step(batch), batch)
            graph.capture(self._capture, ahead=ahead)
        self._graphs[key] = graph
        return graph


class DecodeGraph:
    """A step for a number of sequences, its state, and its inputs, which come through pinned memory.

    The step is captured alone, and together with the choice of the likeliest tokens as the next step's inputs, each
    when it is first asked for.

    Attributes:
        occupant: The state that lives here.
        choice: [3, batch] int64: token ids, positions and, behind a choice, the bits of the chosen tokens' logits.
        inputs: The first two rows of `choice`.
    """

    def __init__(self, model: Stateful, step: Step, batch: int) -> None:
        device = model.device
        on_gpu = device.type == "cuda"
        self.occupant: weakref.ref[GraphState] | None = None
        self.choice = torch.zeros(3, batch, dtype=torch.int64, device=device)
        self.inputs = self.choice[:2]
        self._states = model.initial_state(batch)
        self._staging = deque(Staging((2, batch), on_gpu) for _ in range(STEPS_AHEAD))
        self._step = step  # a captured call keeps none of its buffers alive
        self._alone: Captured | None = None
        self._choosing: Captured | None = None

    def is_captured(self, *, ahead: bool) -> bool:
        """Whether the step is, alone or with the choice."""
        return (self._choosing if ahead else self._alone) is not None

    def capture(self, capture: Capture, *, ahead: bool) -> None:
        """Capture the step, alone or with the choice. It runs, so the state that lives here moves out before."""
        self._move_out()
        if ahead:
            self._choosing = capture(self._step_and_choose)
        else:
            self._alone = capture(self._step_alone)

    def rows(self, batch: int) -> tuple[Tensor, ...]:
        """The first `batch` sequences of the state."""
        return tuple(state[:batch] for state in self._states)

    def empty_answer(self, batch: int) -> Tensor:
        """Memory for the logits of one step, [batch, vocab]."""
        assert self._alone is not None
        return torch.empty_like(self._of(self._alone.logits, batch))

    def admit(self, state: GraphState) -> None:
        """Bring a state in; the one that lives here moves out first. Nothing is changed where memory is short."""
        if state.graph is self:
            return
        self._move_out()
        B = state.batch
        torch._foreach_copy_(list(self.rows(B)), list(state.tensors))
        if len(self._states[0]) > B:
            for own in self._states:
                own[B:].zero_()
        if state.inputs is not None:
            self.inputs.copy_(state.inputs)

    def feed(self, input_ids: Tensor, positions: Tensor) -> None:
        """Start to bring token ids [B, 1] and positions [B] in."""
        send_token(self._staging[0], input_ids, positions, self.inputs)
        self._staging.rotate(-1)

    def feed_chosen(self, input_ids: Tensor, vocab_size: int) -> None:
        """Put token ids [B, 1] of the device, which nobody has checked, in the place of the likeliest ones."""
        torch.clamp(input_ids.squeeze(1), 0, vocab_size - 1, out=self.inputs[0, : len(input_ids)])

    def run(self, answer: Tensor) -> None:
        """Step the state that was admitted, and write logits [B, vocab] into `answer`, without waiting."""
        assert self._alone is not None
        self._alone.replay()
        answer.copy_(self._of(self._alone.logits, answer.shape[0]))

    def run_ahead(self, batch: int) -> Tensor:
        """Step the state, and choose; return logits [B, vocab] in the graph's own memory, without waiting."""
        assert self._choosing is not None
        self._choosing.replay()
        return self._of(self._choosing.logits, batch)

    def move_on(self, state: GraphState, inputs: Tensor | None) -> GraphState:
        """Consume the state that was stepped; return the one that lives here now."""
        tensors = state.tensors if state.graph is self else self.rows(state.batch)
        state.tensors, state.consumed = (), True
        new = GraphState(state.owner, tensors, self, inputs)
        self.occupant = weakref.ref(new)
        return new

    def _of(self, logits: Tensor, batch: int) -> Tensor:
        return logits if logits.shape[0] == batch else logits[:batch]

    def close(self) -> None:
        """Leave the state to whom it belongs: this graph will not run again."""
        occupant = self._living()
        if occupant is not None:
            occupant.graph = None

    def _step_alone(self) -> Tensor:
        return self._step(self.inputs[0].unsqueeze(1), self.inputs[1], self._states)

    def _step_and_choose(self) -> Tensor:
        logits = self._step_alone()
        tokens, positions, bits = self.choice
        # Of equal ones the first, as argmax does; NaN where there is one.
        torch.max(logits, -1, out=(bits.view(logits.dtype)[: len(tokens)], tokens))
        positions.add_(1)
        return logits

    def _move_out(self) -> None:
        """Give the state that lives here memory of its own. Nothing is changed where there is none."""
        occupant = self._living()
        if occupant is not None:
            tensors = tuple(tensor.clone() for tensor in occupant.tensors)
            occupant.inputs = None if occupant.inputs is None else occupant.inputs.clone()
            occupant.tensors, occupant.graph = tensors, None
        self.occupant = None

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
