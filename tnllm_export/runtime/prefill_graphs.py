"""Prefill of short prompts as CUDA graphs: launching their kernels from Python takes longer than running them.

A graph is bound to shapes. So prompts are padded, on the right and with rows of length 0, to one of a few sizes, and
there is one graph for each of them. Padding changes no result beyond the order of sums, and costs little: a prompt of
up to some 150 tokens takes as long as reading the weights, and above 128 tokens sizes are 64 apart. A size that is used
for the first time runs as it is, padded, and what is used again is captured: a length that comes once pays for no
capture, and the answer to a prompt is the same, bit for bit, each time.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tnllm_export.errors import DeviceMemoryError, RuntimeTargetError
from tnllm_export.kernels.dispatch import Choice, kernel_choice
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.fused_prefill import prefill
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime.cuda_graphs import Capture, Captured, CudaCapture, Staging
from tnllm_export.runtime.decode_graphs import graph_batch
from tnllm_export.runtime.device_memory import reporting_out_of_memory
from tnllm_export.runtime.gpu import on_device
from tnllm_export.runtime.state import StateHandle

MOST_TOKENS = 2048
"""Tokens of a call, padding included; with more, the GPU is busy for longer than the host."""

MOST_STATE_BYTES = 2**28
"""Of the states of a call, which graphs hold twice. More sequences at once keep the GPU busy, too."""

MOST_GRAPHS = 16
"""Sizes that are kept; the one that was not used for longest goes first."""

FEWEST_TOKENS, TOKEN_STEP = 16, 64
"""The smallest size of a row, and what the sizes above 128 tokens are multiples of."""


class PrefillGraphs:
    """The prefills of one model, captured for the sizes that are asked for again.

    Memory, beside weights and the callers' states: two states for each number of sequences that graphs are kept for,
    and one pool for the activations of all graphs, `activation_bytes` of MOST_TOKENS.
    """

    def __init__(self, model: TransnormerForCausalLM, capture: Capture | None = None) -> None:
        """Make a set of graphs.

        Args:
            model: Its device decides where all tensors are.
            capture: Captures a call whose inputs and outputs stay where they are; default: as a CUDA graph.
        """
        weight = model.lm_head.weight
        self._model = model
        self._device = weight.device
        # One that is captured has run before.
        self._capture: Capture | None = capture or CudaCapture(
            self._device, warm_ups=1, reserve=activation_bytes(model.config, MOST_TOKENS, weight.dtype)
        )
        self._most_rows = MOST_STATE_BYTES // (model.config.state_elements(1) * model.state_dtype.itemsize)
        self._graphs: OrderedDict[tuple[int, int, Choice], PrefillGraph] = OrderedDict()
        self._states: dict[int, States] = {}
        # What threads enqueue stays together, as long as they share a stream.
        self._lock = threading.Lock()

    def take(self, batch: int, tokens: int) -> bool:
        """Whether a prompt of this size is short enough."""
        rows = graph_batch(batch)
        return rows <= self._most_rows and rows * graph_tokens(tokens) <= MOST_TOKENS

    def prefill(
        self, input_ids: Tensor, lengths: Tensor, positions: Tensor, past: StateHandle
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed input_ids [B, T] with lengths [B] and positions [B], which were checked and which `take` takes.

        Returns:
            Logits [B, vocab] of each row's last valid token, and the new state; `past` stays as it is.

        Raises:
            DeviceMemoryError: The GPU's memory does not suffice. No graph is kept then: without, there may be enough.
        """
        B, T = input_ids.shape
        work, way_out = f"prefill of {B} x {T} tokens", "feed the prompt in smaller pieces (--prefill-chunk)"
        with self._lock, on_device(self._device):
            try:
                with reporting_out_of_memory(self._device, work, way_out):
                    graph = self._graph(graph_batch(B), graph_tokens(T))
                    graph.send(input_ids, lengths, positions, past)
                    return graph.run(B)
            except DeviceMemoryError:
                self._graphs.clear()
                self._states.clear()
                raise

    def _graph(self, batch: int, tokens: int) -> "PrefillGraph":
        key = (batch, tokens, kernel_choice())
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= MOST_GRAPHS:
                self._evict()
            if batch not in self._states:
                self._states[batch] = States(self._model.initial_state(batch), self._model.initial_state(batch))
            graph = self._graphs[key] = PrefillGraph(self._model, tokens, self._states[batch])
        elif self._capture is not None and not graph.captured:
            self._try_to_capture(graph, f"prefill of {batch} x {tokens} tokens")
        self._graphs.move_to_end(key)
        return graph

    def _evict(self) -> None:
        (batch, *_), _ = self._graphs.popitem(last=False)
        if all(kept != batch for kept, *_ in self._graphs):
            del self._states[batch]

    def _try_to_capture(self, graph: "PrefillGraph", work: str) -> None:
        assert self._capture is not None
        try:
            with reporting_out_of_memory(self._device, work, "free some"):
                graph.capture(self._capture)
        except (RuntimeTargetError, DeviceMemoryError) as error:
            self._capture = None
            warnings.warn(
                f"{work}: found no way to capture it as a CUDA graph; prompts of other sizes are not captured either "
                f"and take longer: {error}",
                stacklevel=4,
            )


@dataclass(frozen=True)
class States:
    """What graphs of one number of sequences read and write, one [B, H, K, V] per layer: all anew for each prompt."""

    past: list[Tensor]
    present: list[Tensor]


class PrefillGraph:
    """Prefill of one size, [B, T], and its inputs, which come through pinned memory."""

    def __init__(self, model: TransnormerForCausalLM, tokens: int, states: States) -> None:
        """Make it, not captured, for T = `tokens` and states that other graphs may use, too."""
        device = model.device
        self._tokens = tokens
        self._states = states
        B = len(states.past[0])
        # Token ids, row by row, then positions and lengths: one copy brings all.
        self._inputs = torch.zeros(B * (tokens + 2), dtype=torch.int64, device=device)
        self._staging = Staging((B * (tokens + 2),), device.type == "cuda")
        input_ids = self._inputs[: B * tokens].view(B, tokens)
        positions, lengths = self._inputs[B * tokens :].view(2, B)
        self._captured: Captured | None = None
        self._call: Callable[[], Tensor] = lambda: prefill(
            model, input_ids, lengths.to(torch.int32), positions, states.past, states.present
        )[0]

    @property
    def captured(self) -> bool:
        """Whether it is a CUDA graph by now."""
        return self._captured is not None

    def capture(self, capture: Capture) -> None:
        """Capture it, on the last inputs that were sent."""
        self._captured = capture(self._call)

    def send(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, past: StateHandle) -> None:
        """Start to bring inputs and state to where they are read. What is padded has length 0 and token id 0."""
        rows, T = input_ids.shape
        B, size = len(self._states.past[0]), self._tokens
        if input_ids.is_cpu and lengths.is_cpu and positions.is_cpu:
            staged = self._staging.numbers()
            staged[:] = 0
            staged[: B * size].reshape(B, size)[:rows, :T] = input_ids.numpy()
            staged[B * size :].reshape(2, B)[:, :rows] = positions.numpy(), lengths.numpy()
            self._staging.send(self._inputs)
        else:
            self._inputs.zero_()
            self._inputs[: B * size].view(B, size)[:rows, :T] = input_ids
            for place, numbers in enumerate((positions, lengths)):
                self._inputs[B * (size + place) :][:rows] = numbers
        torch._foreach_copy_(_rows(self._states.past, rows), list(past.tensors))

    def run(self, rows: int) -> tuple[Tensor, list[Tensor]]:
        """Read what was sent; return logits [rows, vocab] and the new state, in memory of their own."""
        if self._captured is None:
            logits = self._call()[:rows]
        else:
            self._captured.replay()
            logits = self._captured.logits[:rows].clone()
        written = _rows(self._states.present, rows)
        present = [torch.empty_like(tensor) for tensor in written]
        torch._foreach_copy_(present, written)
        return logits, present


def graph_tokens(tokens: int) -> int:
    """Tokens of the graph that reads rows of `tokens`: a power of two from 16 to 128, then a multiple of 64."""
    if tokens > 2 * TOKEN_STEP:
        return -(-tokens // TOKEN_STEP) * TOKEN_STEP
    return max(1 << (tokens - 1).bit_length(), FEWEST_TOKENS)


def activation_bytes(config: TransnormerConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the activations that are alive at once in a layer, in the released form, and an eighth to round up.

    Residual and norm all the time; with them the projection, heads and the gate's product, or SGLU's three tensors.
    """
    d = config.decoder_embed_dim
    keys = max(map(config.key_dim, range(config.decoder_layers))) * config.decoder_attention_heads
    mixer, channel = 4 * d + 2 * keys + 2 * d, 3 * config.glu_dim
    return tokens * (2 * d + max(mixer, channel)) * dtype.itemsize * 9 // 8


def _rows(tensors: list[Tensor], rows: int) -> list[Tensor]:
    """The first rows of each; slicing takes the host some time."""
    return tensors if len(tensors[0]) == rows else [tensor[:rows] for tensor in tensors]
