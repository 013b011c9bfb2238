"""ONNX Runtime's sessions on a CUDA device, and the buffers in which their CUDA graphs decode."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import torch
from torch import Tensor

from tnllm_export.errors import DeviceMemoryError, RuntimeMissingError, RuntimeTargetError, UnsupportedTargetError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.runtime.cuda_graphs import Staging, send_token
from tnllm_export.runtime.onnxruntime import bind, first_line, named

PROVIDER = "CUDAExecutionProvider"
LET_GO = "let go of states that are not needed any more"

_ERRORS = 3
"""ONNX Runtime's log level: nothing below errors, which are raised as well."""


class Program:
    """A session and the stream that it runs on; None where the device is the CPU."""

    def __init__(
        self,
        session: Any,
        device: torch.device,
        stream: Any = None,
        run_options: Callable[[], Any] | None = None,
        weights: object = None,
    ) -> None:
        """Make a program.

        Args:
            session: An InferenceSession.
            device: Where its inputs and outputs are.
            stream: The CUDA stream that it was told to use.
            run_options: Makes RunOptions, where the session captures CUDA graphs.
            weights: What must live as long as the session, which does not own it.
        """
        self.device = device
        self._session = session
        self._stream = stream
        self._run_options = run_options
        self._weights = weights

    @classmethod
    def open(
        cls,
        ort: Any,
        path: str,
        weights: Mapping[str, Any],
        device: torch.device,
        stream: Any,
        *,
        capture: bool,
        threads: int | None,
    ) -> Self:
        """Open a graph on CUDA, over weights that are there already.

        Raises:
            RuntimeMissingError: ONNX Runtime can't load its CUDA provider.
            UnsupportedTargetError: It refuses the graph.
            DeviceMemoryError: The GPU's memory does not suffice.
        """
        # Its environment warns at each session that CUDA is no plugin; a session's own level does not count.
        ort.set_default_logger_severity(_ERRORS)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 1
        options.log_severity_level = _ERRORS
        # A plan made for the first prompt of a length takes one block for the next, beside what the arena has already.
        options.enable_mem_pattern = False
        for name, value in weights.items():
            options.add_initializer(name, value)
        provider = {
            "device_id": str(device.index),
            "user_compute_stream": str(stream.cuda_stream),
            "use_tf32": "0",
            "enable_cuda_graph": str(int(capture)),
            # No more memory than is asked for: by default it is taken in powers of two.
            "arena_extend_strategy": "kSameAsRequested",
        }
        try:
            # Without falling back to the CPU, which would hide why CUDA did not do.
            session = ort.InferenceSession(path, options, providers=[(PROVIDER, provider)], enable_fallback=0)
        except Exception as error:
            raise _failure(
                error,
                f"{path}: onnxruntime {ort.__version__} on cuda refuses the graph",
                "export again with this version of tnllm-export, or load the bundle with the runtime torch",
                UnsupportedTargetError,
            ) from error
        if PROVIDER not in session.get_providers():
            raise RuntimeMissingError(
                f"onnxruntime {ort.__version__} can't load its CUDA libraries beside those of PyTorch (CUDA "
                f"{torch.version.cuda}); expected the same major version of CUDA: install an onnxruntime-gpu that is "
                "built for it"
            )
        return cls(session, device, stream, ort.RunOptions if capture else None, weights)

    def bind(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Any:
        """Bind contiguous tensors of the device by address; the caller keeps them alive."""
        return bind(self._session, inputs, outputs)

    def graph_options(self, number: int) -> Any:
        """Return the options of runs that are one CUDA graph, the one of this number; None where none is captured."""
        if self._run_options is None:
            return None
        options = self._run_options()
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def release(self, number: int) -> None:
        """Let go of the CUDA graph of this number."""
        self._session.release_captured_graph(number)

    def run(self, binding: Any, work: str, way_out: str, options: Any = None) -> None:
        """Run after what the current stream has been given, and wait. Raises DeviceMemoryError, RuntimeTargetError."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:
            raise _failure(error, f"{work}: onnxruntime failed", way_out, RuntimeTargetError) from error
        if self._stream is not None:
            self._stream.synchronize()


class DecodeSlots:
    """Slots to decode in, one for each state that is being decoded, and one that waits for the next of its size.

    Capturing takes three runs, so a slot is used again where that is possible; one of another size takes its place.
    """

    def __init__(self, program: Program, config: TransnormerConfig) -> None:
        self._program = program
        self._config = config
        self._numbers = count(1)  # 0 is ONNX Runtime's own
        self._free: DecodeSlot | None = None

    def take(self, past: Sequence[Tensor]) -> "Lease":
        """Copy a state into side 0 of a slot. The slot is free again when nobody holds the lease."""
        B = past[0].shape[0]
        slot, self._free = self._free, None
        if slot is not None and slot.batch != B:
            slot.close()
            slot = None
        if slot is None:
            slot = DecodeSlot(self._program, self._config, B, (next(self._numbers), next(self._numbers)))
        lease = Lease(slot)
        weakref.finalize(lease, self._give_back, slot).atexit = False
        torch._foreach_copy_(slot.sides[0], list(past))
        return lease

    def _give_back(self, slot: "DecodeSlot") -> None:
        if self._free is not None:
            self._free.close()
        self._free = slot


class DecodeSlot:
    """Buffers at fixed addresses: token ids, positions, logits and a state on two sides."""

    def __init__(self, program: Program, config: TransnormerConfig, batch: int, numbers: tuple[int, int]) -> None:
        """Make a slot for `batch` sequences, whose two steps are the CUDA graphs of these numbers."""
        device = program.device
        self.batch = batch
        self.sides = [empty_state(config, batch, device) for _ in range(2)]
        self._program = program
        # Token ids and positions: one copy brings both.
        self._inputs = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._staging = Staging((2, batch), device.type == "cuda")
        self._logits = torch.empty(batch, config.vocab_size, device=device)
        self._numbers = numbers
        inputs = {"input_ids": self._inputs[0].unsqueeze(1), "positions": self._inputs[1]}
        self._steps = [
            (
                program.bind(
                    {**inputs, **named("past_state", self.sides[side])},
                    {"logits": self._logits, **named("present_state", self.sides[1 - side])},
                ),
                program.graph_options(numbers[side]),
            )
            for side in (0, 1)
        ]

    def run(self, side: int, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Step from the state on `side` to the other side; return logits [B, vocab] in memory of their own."""
        send_token(self._staging, input_ids, positions, self._inputs)
        binding, options = self._steps[side]
        self._program.run(binding, "decode", LET_GO, options)
        return self._logits.clone()

    def close(self) -> None:
        """Let go of the CUDA graphs: this slot will not run again."""
        for number in self._numbers:
            self._program.release(number)


@dataclass(frozen=True, eq=False)
class Lease:
    """Held by the states that lie in a slot."""

    slot: DecodeSlot


def empty_state(config: TransnormerConfig, batch: int, device: torch.device) -> list[Tensor]:
    """Return memory for a state of `batch` sequences: one [B, H, K, V] float32 per layer."""
    return [torch.empty(config.state_shape(layer, batch), device=device) for layer in range(config.decoder_layers)]


def _failure(error: Exception, what: str, way_out: str, kind: type[RuntimeTargetError]) -> RuntimeTargetError:
    """Say in one line what ONNX Runtime says in many, out of memory by its own class."""
    text = str(error)
    short = any(sign in text for sign in ("Failed to allocate memory", "out of memory", "Available memory of"))
    return (DeviceMemoryError if short else kind)(f"{what} ({first_line(error)}); {way_out}")
