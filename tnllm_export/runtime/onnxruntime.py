"""ONNX Runtime on the CPU: both graphs of a bundle, with bound inputs and outputs and memory-mapped weights.

`onnxruntime_cuda` is the same on a GPU.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from tnllm_export.bundle import Bundle
from tnllm_export.errors import RuntimeMissingError, RuntimeTargetError, UnsupportedTargetError
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import StateHandle, check_batch, check_handle, check_state_tensors
from tnllm_export.runtime.support import check_supported, weights_id
from tnllm_export.runtime.validation import check_decode, check_prefill

# Constants up to this size are folded when a session starts. Larger ones are transposed weights: folding would copy
# every matrix out of the mapped file, and MatMul reads them transposed just as fast.
_FOLDED_BYTES = 1 << 20

_NUMPY_DTYPES = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32}


class OnnxRuntime:
    """Runs a bundle's prefill and decode graphs. State and logits live in buffers that the graphs write directly.

    float32 weights are read from `weights.safetensors` through the page cache, once for both graphs. The CPU has no
    float16 matrix product: ONNX Runtime keeps a float32 copy of float16 weights for each graph.
    """

    def __init__(self, info: RuntimeInfo, prefill: Any, decode: Any) -> None:
        self._info = info
        self._prefill = prefill
        self._decode = decode

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, *, device: str = "cpu", threads: int | None = None, prepack: bool = False
    ) -> Self:
        """Open both graphs of a bundle.

        Args:
            bundle: What to run.
            device: "cpu".
            threads: Threads inside one operator; default: one per physical core.
            prepack: Copy float32 weights into ONNX Runtime's packed layout, once per graph: decoding several
                sequences at once is up to twice as fast, for twice the weights' size in memory.

        Raises:
            RuntimeMissingError: The package `onnxruntime` is not installed.
            UnsupportedTargetError: A dtype, lowering, opset or device that it does not run.
        """
        ort = import_onnxruntime()
        target = check_supported(bundle, "onnxruntime", device)
        mapped = bundle.manifest.dtype == "float32" and not prepack
        info = RuntimeInfo(
            name=target.runtime,
            device=target.device,
            dtype=bundle.manifest.dtype,
            config=bundle.manifest.config,
            logits=bundle.manifest.logits,
            weights_id=weights_id(bundle),
        )
        prefill, decode = (
            _open_session(ort, path, threads, mapped) for path in (bundle.prefill_path, bundle.decode_path)
        )
        return cls(info, prefill, decode)

    @property
    def info(self) -> RuntimeInfo:
        """What is loaded."""
        return self._info

    def initial_state(self, batch: int) -> State:
        """Return the all-zero state of `batch` sequences."""
        check_batch(batch)
        return _OrtState(self, [tensor.zero_() for tensor in self._empty_state(batch)])

    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, T]; see `Runtime.prefill`."""
        vocab = self._info.config.vocab_size
        check_prefill(vocab, input_ids, lengths, positions)
        B, T = input_ids.shape
        past = check_handle(self, state, B).tensors
        present = self._empty_state(B)
        logits = torch.empty((B, T, vocab) if self._info.logits == "all" else (B, vocab))
        inputs = {
            "input_ids": input_ids.contiguous(),
            "lengths": lengths.contiguous(),
            "positions": positions.contiguous(),
            **named("past_state", past),
        }
        binding = bind(self._prefill, inputs, {"logits": logits, **named("present_state", present)})
        _run(self._prefill, binding)
        return logits, _OrtState(self, present)

    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, 1] and consume `state`; see `Runtime.decode`."""
        check_decode(self._info.config.vocab_size, input_ids, positions)
        handle = cast(_OrtState, check_handle(self, state, input_ids.shape[0]))
        steps = handle.steps or _DecodeSteps(self._decode, handle.tensors, self._info.config.vocab_size)
        logits = steps.run(handle.side, input_ids, positions)
        handle.consumed = True
        other = 1 - handle.side
        return logits, _OrtState(self, steps.sides[other], steps, other)

    def host_state(self, state: State) -> list[Tensor]:
        """Copy a state out: one [B, H, K, V] float32 per layer."""
        return [tensor.clone() for tensor in check_handle(self, state, None).tensors]

    def device_state(self, tensors: list[Tensor]) -> State:
        """Copy tensors into a new state."""
        check_state_tensors(self._info.config, tensors, torch.float32)
        return _OrtState(self, [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors])

    def _empty_state(self, batch: int) -> list[Tensor]:
        config = self._info.config
        return [torch.empty(config.state_shape(layer, batch)) for layer in range(config.decoder_layers)]


class _OrtState(StateHandle):
    """A state that remembers the decode buffers it lies in, if any, and on which of their two sides."""

    __slots__ = ("side", "steps")

    def __init__(
        self, owner: object, tensors: list[Tensor], steps: "_DecodeSteps | None" = None, side: int = 0
    ) -> None:
        super().__init__(owner, tensors)
        self.steps = steps
        self.side = side


class _DecodeSteps:
    """Two sets of state buffers and the bindings that lead from each to the other, made once per generation.

    A step then allocates and binds nothing but the logits it hands out, and a failed step has only touched buffers
    that no live state uses.
    """

    def __init__(self, session: Any, past: tuple[Tensor, ...], vocab_size: int) -> None:
        B = past[0].shape[0]
        self.sides = [list(past), [torch.empty_like(tensor) for tensor in past]]
        self._session = session
        self._input_ids = torch.empty(B, 1, dtype=torch.int64)
        self._positions = torch.empty(B, dtype=torch.int64)
        self._vocab_size = vocab_size
        inputs = {"input_ids": self._input_ids, "positions": self._positions}
        self._bindings = [
            bind(
                session,
                {**inputs, **named("past_state", self.sides[side])},
                named("present_state", self.sides[1 - side]),
            )
            for side in (0, 1)
        ]

    def run(self, side: int, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Step from the state on `side` to the other side; return logits [B, vocab]."""
        self._input_ids.copy_(input_ids)
        self._positions.copy_(positions)
        logits = torch.empty(self._input_ids.shape[0], self._vocab_size)
        bind_tensors(self._bindings[side].bind_output, {"logits": logits})
        _run(self._session, self._bindings[side])
        return logits


def import_onnxruntime() -> Any:
    """Import the package. Raises RuntimeMissingError."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RuntimeMissingError(
            f"the package onnxruntime can't be imported ({error}); install it with: pip install onnxruntime"
        ) from error


def _open_session(ort: Any, path: Path, threads: int | None, mapped: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors; they are raised as well
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(_FOLDED_BYTES))
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedTargetError(
            f"{path}: onnxruntime {ort.__version__} refuses the graph ({first_line(error)}); "
            "export again with this version of tnllm-export, or load the bundle with the runtime torch"
        ) from error


def named(prefix: str, tensors: "list[Tensor] | tuple[Tensor, ...]") -> dict[str, Tensor]:
    """Name the tensors of a state as the graphs do."""
    return {f"{prefix}.{layer}": tensor for layer, tensor in enumerate(tensors)}


def bind(session: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Any:
    """Bind contiguous tensors by address; the caller keeps them alive while the binding is used."""
    binding = session.io_binding()
    bind_tensors(binding.bind_input, inputs)
    bind_tensors(binding.bind_output, outputs)
    return binding


def bind_tensors(bind_one: Callable[..., None], tensors: dict[str, Tensor]) -> None:
    """Bind contiguous tensors by address with a binding's method for inputs or outputs."""
    for name, tensor in tensors.items():
        device = tensor.device
        bind_one(
            name, device.type, device.index or 0, _NUMPY_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
        )


def _run(session: Any, binding: Any) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise RuntimeTargetError(f"onnxruntime failed: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, without its traceback of C++."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
