"""ONNX Runtime on a CUDA device: weights, states and logits stay there, and a decode step is one CUDA graph.

Weights are loaded once, for both graphs. Everything runs on one stream of its own. A CUDA graph is bound to addresses:
a decode step goes from one of two sets of state buffers to the other, and each direction is captured the first time
that it runs.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor

from tnllm_export.bundle import Bundle
from tnllm_export.errors import DeviceMemoryError, RuntimeMissingError, RuntimeTargetError, UnsupportedTargetError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.runtime.device_memory import reporting_out_of_memory
from tnllm_export.runtime.onnxruntime import bind, first_line, import_onnxruntime, named
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import StateHandle, check_batch, check_handle, check_state_tensors
from tnllm_export.runtime.support import check_supported, weights_id
from tnllm_export.runtime.validation import check_decode, check_prefill

PROVIDER = "CUDAExecutionProvider"
_INSTALL = "pip uninstall onnxruntime, then pip install 'tnllm-export[onnxruntime-gpu]'"
_LET_GO = "let go of states that are not needed any more"


class OnnxRuntimeCuda:
    """Runs a bundle's graphs with everything on one device. Logits stay there too."""

    def __init__(self, info: RuntimeInfo, prefill: "Program", decode: "Program") -> None:
        self._info = info
        self._prefill = prefill
        self._device = prefill.device
        self._slots = DecodeSlots(decode, info.config)

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load the weights onto the current CUDA device and open both graphs.

        Args:
            bundle: What to run.
            threads: Of the few operators that run on the CPU, on shapes.

        Raises:
            RuntimeMissingError: `onnxruntime` is not installed, is the build for CPUs, or can't load CUDA's libraries.
            UnsupportedTargetError: There is no CUDA device, or a dtype, lowering or opset that it does not run.
            DeviceMemoryError: The weights do not fit into the GPU's memory.
        """
        target = check_supported(bundle, "onnxruntime", "cuda")
        ort = import_onnxruntime_gpu()
        device = _current_gpu()
        with reporting_out_of_memory(
            device, f"{bundle.path}: loading the weights", "free it for others' work, or run with --device cpu"
        ):
            weights = read_weights(ort, bundle, device)
        info = RuntimeInfo(
            name=target.runtime,
            device=target.device,
            dtype=bundle.manifest.dtype,
            config=bundle.manifest.config,
            logits=bundle.manifest.logits,
            weights_id=weights_id(bundle),
        )
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        prefill, decode = (
            Program.open(ort, str(path), weights, device, stream, capture=capture, threads=threads)
            for path, capture in ((bundle.prefill_path, False), (bundle.decode_path, True))
        )
        return cls(info, prefill, decode)

    @property
    def info(self) -> RuntimeInfo:
        """What is loaded."""
        return self._info

    def initial_state(self, batch: int) -> State:
        """Return the all-zero state of `batch` sequences."""
        check_batch(batch)
        with reporting_out_of_memory(self._device, f"a state of {batch} sequences", "take fewer at once"):
            return _SlotState(self, [tensor.zero_() for tensor in self._empty_state(batch)])

    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, T]; see `Runtime.prefill`. Raises DeviceMemoryError where T is too large for the GPU."""
        vocab = self._info.config.vocab_size
        check_prefill(vocab, input_ids, lengths, positions)
        B, T = input_ids.shape
        past = check_handle(self, state, B).tensors
        work, way_out = f"prefill of {B} x {T} tokens", "feed the prompt in smaller pieces (--prefill-chunk)"
        with reporting_out_of_memory(self._device, work, way_out):
            present = self._empty_state(B)
            shape = (B, T, vocab) if self._info.logits == "all" else (B, vocab)
            logits = torch.empty(shape, device=self._device)
            inputs = {"input_ids": input_ids, "lengths": lengths, "positions": positions}
            inputs = {name: tensor.to(self._device).contiguous() for name, tensor in inputs.items()}
        binding = self._prefill.bind(
            {**inputs, **named("past_state", past)}, {"logits": logits, **named("present_state", present)}
        )
        self._prefill.run(binding, work, way_out)
        return logits, _SlotState(self, present)

    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, 1] and consume `state`; see `Runtime.decode`. Raises DeviceMemoryError as prefill does."""
        check_decode(self._info.config.vocab_size, input_ids, positions)
        handle = cast(_SlotState, check_handle(self, state, input_ids.shape[0]))
        with reporting_out_of_memory(self._device, "decode", _LET_GO):
            lease, side = (handle.lease, handle.side) if handle.lease else (self._slots.take(handle.tensors), 0)
            logits = lease.slot.run(side, input_ids, positions)
        handle.consumed = True
        return logits, _SlotState(self, lease.slot.sides[1 - side], lease, 1 - side)

    def host_state(self, state: State) -> list[Tensor]:
        """Copy a state to the host: one [B, H, K, V] float32 per layer."""
        return [tensor.to("cpu", copy=True) for tensor in check_handle(self, state, None).tensors]

    def device_state(self, tensors: list[Tensor]) -> State:
        """Copy host tensors into a new state."""
        check_state_tensors(self._info.config, tensors, torch.float32)
        with reporting_out_of_memory(self._device, "a state", _LET_GO):
            copies = [tensor.detach().to(self._device, copy=True).contiguous() for tensor in tensors]
        return _SlotState(self, copies)

    def _empty_state(self, batch: int) -> list[Tensor]:
        return _empty_state(self._info.config, batch, self._device)


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
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 1
        options.log_severity_level = 3  # errors; they are raised as well
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

    def take(self, past: Sequence[Tensor]) -> "_Lease":
        """Copy a state into side 0 of a slot. The slot is free again when nobody holds the lease."""
        B = past[0].shape[0]
        slot, self._free = self._free, None
        if slot is not None and slot.batch != B:
            slot.close()
            slot = None
        if slot is None:
            slot = DecodeSlot(self._program, self._config, B, (next(self._numbers), next(self._numbers)))
        lease = _Lease(slot)
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
        on_gpu = device.type == "cuda"
        self.batch = batch
        self.sides = [_empty_state(config, batch, device) for _ in range(2)]
        self._program = program
        # Token ids and positions: one copy brings both.
        self._inputs = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._staged = torch.zeros(2, batch, dtype=torch.int64, pin_memory=on_gpu)
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
        if input_ids.is_cpu and positions.is_cpu:
            # No earlier copy is under way: each run was waited for.
            self._staged[0] = input_ids.squeeze(1)
            self._staged[1] = positions
            self._inputs.copy_(self._staged, non_blocking=True)
        else:
            self._inputs[0] = input_ids.squeeze(1)
            self._inputs[1] = positions
        binding, options = self._steps[side]
        self._program.run(binding, "decode", _LET_GO, options)
        return self._logits.clone()

    def close(self) -> None:
        """Let go of the CUDA graphs: this slot will not run again."""
        for number in self._numbers:
            self._program.release(number)


@dataclass(frozen=True, eq=False)
class _Lease:
    """Held by the states that lie in a slot."""

    slot: DecodeSlot


class _SlotState(StateHandle):
    """A state that remembers the slot it lies in, if any, and on which of its two sides."""

    __slots__ = ("lease", "side")

    def __init__(self, owner: object, tensors: Sequence[Tensor], lease: _Lease | None = None, side: int = 0) -> None:
        super().__init__(owner, tensors)
        self.lease = lease
        self.side = side


def import_onnxruntime_gpu() -> Any:
    """Import ONNX Runtime and check that it is a build for CUDA. PyTorch, imported before, brings CUDA's libraries.

    Raises:
        RuntimeMissingError: It is not installed, or is the build for CPUs.
    """
    ort = import_onnxruntime()
    providers = ort.get_available_providers()
    if PROVIDER not in providers:
        raise RuntimeMissingError(
            f"onnxruntime {ort.__version__} has no {PROVIDER}, only {', '.join(providers)}; the device cuda needs "
            f"onnxruntime-gpu in its place: {_INSTALL}"
        )
    return ort


def read_weights(ort: Any, bundle: Bundle, device: torch.device) -> dict[str, Any]:
    """Load a bundle's weights onto a device, as OrtValues that sessions can share."""
    with safe_open(bundle.weights_path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no dict
    return {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in tensors.items()}


def _current_gpu() -> torch.device:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and this PyTorch is built without CUDA"
        raise UnsupportedTargetError(
            f"onnxruntime on cuda needs an NVIDIA GPU, and PyTorch finds no CUDA device{built}; run where there is "
            "one, or with --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _failure(error: Exception, what: str, way_out: str, kind: type[RuntimeTargetError]) -> RuntimeTargetError:
    """Say in one line what ONNX Runtime says in many, out of memory by its own class."""
    text = str(error)
    short = any(sign in text for sign in ("Failed to allocate memory", "out of memory", "Available memory of"))
    return (DeviceMemoryError if short else kind)(f"{what} ({first_line(error)}); {way_out}")


def _empty_state(config: TransnormerConfig, batch: int, device: torch.device) -> list[Tensor]:
    return [torch.empty(config.state_shape(layer, batch), device=device) for layer in range(config.decoder_layers)]
