"""One of TensorRT's engines and its execution contexts."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm_export.bundle import files
from tnllm_export.errors import RuntimeTargetError
from tnllm_export.tensorrt import last_error


class Program:
    """One engine, and what all its contexts share: the stream, external weights, kernels compiled so far.

    TensorRT-RTX compiles kernels for the GPU when a context first needs them, and keeps them in a runtime cache.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        weights: Mapping[str, Tensor],
        stream: torch.cuda.Stream,
        cache: Path,
        *,
        captured: bool,
    ) -> None:
        """Make a program.

        Args:
            trt: TensorRT's package.
            engine: What it deserialized.
            weights: On the device; those that the engine has as inputs are bound.
            stream: Where all contexts run.
            cache: File of the kernels compiled so far, which need not be there yet.
            captured: Whether runs shall become CUDA graphs.
        """
        self.trt = trt
        self.stream = stream
        self._engine = engine
        names = {engine.get_tensor_name(place) for place in range(engine.num_io_tensors)}
        self._weights = {name: weight for name, weight in weights.items() if name in names}
        self._config = None
        self._saved = False
        self._cache_file = cache
        if hasattr(trt, "IRuntimeCache"):
            self._config = engine.create_runtime_config()
            self._cache = self._config.create_runtime_cache()
            if cache.is_file():
                self._cache.deserialize(cache.read_bytes())
                last_error(trt)  # kernels of another version are compiled again: nobody asked
            self._config.set_runtime_cache(self._cache)
            if captured:
                # By default kernels for a shape are compiled while others run, and then take their place: what was
                # captured would go on with kernels that are no more.
                strategies = trt.DynamicShapesKernelSpecializationStrategy
                self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER

    def context(self) -> "Context":
        """Return a new context. Raises RuntimeTargetError where there is no memory for it."""
        made = self._engine.create_execution_context(*([] if self._config is None else [self._config]))
        if made is None:
            reason = last_error(self.trt)
            raise RuntimeTargetError(f"{self.trt.__name__} could not make a context ({reason}); free GPU memory")
        for name, weight in self._weights.items():
            made.set_tensor_address(name, weight.data_ptr())
        return Context(self, made)

    def save_cache(self) -> None:
        """Keep the kernels compiled so far for the next process, once, where the bundle's folder can be written."""
        if self._config is not None and not self._saved:
            self._saved = True
            with contextlib.suppress(OSError):
                files.replace(self._cache_file, bytes(self._cache.serialize()))


class Context:
    """One of TensorRT's execution contexts."""

    def __init__(self, program: Program, context: Any) -> None:
        self._program = program
        self._context = context

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Bind contiguous device tensors, which the caller keeps alive while they are bound."""
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                trt = self._program.trt
                raise RuntimeTargetError(
                    f"{trt.__name__} refuses {name} of shape {list(tensor.shape)} ({last_error(trt)})"
                )
        for name, tensor in (*inputs.items(), *outputs.items()):
            self._context.set_tensor_address(name, tensor.data_ptr())

    @property
    def capturable(self) -> bool:
        """Whether a run can be captured into a CUDA graph: in TensorRT-RTX it may have to allocate memory."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._program.stream.cuda_stream))

    def enqueue(self) -> None:
        """Run on the program's stream, without waiting."""
        if not self._context.execute_async_v3(self._program.stream.cuda_stream):
            trt = self._program.trt
            raise RuntimeTargetError(f"{trt.__name__} failed: {last_error(trt)}")
