"""ONNX Runtime on a CUDA device: weights, states and logits stay there, and a decode step is one CUDA graph.

Weights are loaded once, for both graphs. Everything runs on one stream of its own. A CUDA graph is bound to addresses:
a decode step goes from one of two sets of state buffers to the other, and each direction is captured the first time
that it runs.
"""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor

from tnllm_export.bundle import Bundle
from tnllm_export.errors import RuntimeMissingError
from tnllm_export.runtime.device_memory import reporting_out_of_memory
from tnllm_export.runtime.gpu import current_gpu
from tnllm_export.runtime.onnxruntime import import_onnxruntime, named
from tnllm_export.runtime.onnxruntime_graphs import LET_GO, PROVIDER, DecodeSlots, Lease, Program, empty_state
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import StateHandle, check_batch, check_handle, check_state_tensors
from tnllm_export.runtime.support import check_supported, weights_id
from tnllm_export.runtime.validation import check_decode, check_prefill

_INSTALL = "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"


class OnnxRuntimeCuda:
    """Runs a bundle's graphs with everything on one device. Logits stay there too."""

    def __init__(self, info: RuntimeInfo, prefill: Program, decode: Program) -> None:
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
        device = current_gpu(target.runtime)
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
        with reporting_out_of_memory(self._device, "decode", LET_GO):
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
        with reporting_out_of_memory(self._device, "a state", LET_GO):
            copies = [tensor.detach().to(self._device, copy=True).contiguous() for tensor in tensors]
        return _SlotState(self, copies)

    def _empty_state(self, batch: int) -> list[Tensor]:
        return empty_state(self._info.config, batch, self._device)


class _SlotState(StateHandle):
    """A state that remembers the slot it lies in, if any, and on which of its two sides."""

    __slots__ = ("lease", "side")

    def __init__(self, owner: object, tensors: Sequence[Tensor], lease: Lease | None = None, side: int = 0) -> None:
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
