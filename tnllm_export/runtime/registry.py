"""Which runtimes there are, and opening a bundle with one of them."""

from functools import partial
from pathlib import Path
from typing import Protocol

from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.errors import RuntimeMissingError
from tnllm_export.runtime.aotinductor import AotInductorRuntime
from tnllm_export.runtime.onnxruntime import OnnxRuntime
from tnllm_export.runtime.onnxruntime_cuda import OnnxRuntimeCuda
from tnllm_export.runtime.protocol import Runtime
from tnllm_export.runtime.support import check_threads
from tnllm_export.runtime.tensorrt import TensorrtRuntime
from tnllm_export.runtime.torch import TorchRuntime
from tnllm_export.targets import TARGETS


class _Open(Protocol):
    def __call__(self, bundle: Bundle, *, device: str, threads: int | None) -> Runtime: ...


def _open_onnxruntime(bundle: Bundle, *, device: str, threads: int | None) -> Runtime:
    if device == "cuda":
        return OnnxRuntimeCuda.from_bundle(bundle, threads=threads)
    return OnnxRuntime.from_bundle(bundle, device=device, threads=threads)


_RUNTIMES: dict[str, _Open] = {
    "onnxruntime": _open_onnxruntime,
    "torch": TorchRuntime.from_bundle,
    "aotinductor": AotInductorRuntime.from_bundle,
    "tensorrt-rtx": partial(TensorrtRuntime.from_bundle, name="tensorrt-rtx"),
    "tensorrt": partial(TensorrtRuntime.from_bundle, name="tensorrt"),
}


def load_runtime(
    bundle: Bundle | Path | str, name: str = "onnxruntime", *, device: str | None = None, threads: int | None = None
) -> Runtime:
    """Open a bundle with a runtime.

    Args:
        bundle: The bundle or its folder.
        name: "onnxruntime", "torch" (the PyTorch model itself), "tensorrt-rtx" or "tensorrt".
        device: "cpu" or "cuda"; default: the first that the runtime has in the table of targets.
        threads: Threads of the CPU to use; default: the runtime's own choice.

    Raises:
        BundleError: The folder holds no sound bundle.
        RuntimeMissingError: No such runtime, or its package is not installed.
        EngineError: The bundle has no engines for the runtime, or none that run here.
        UnsupportedTargetError: The runtime does not run this bundle's dtype or lowering, or not on this device.
        RequestError: `threads` is below 1, or above four times the machine's cores (64 on small machines).
    """
    if name not in _RUNTIMES:
        raise RuntimeMissingError(f"unknown runtime {name!r}; expected one of: {', '.join(_RUNTIMES)}")
    check_threads(threads)
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(Path(bundle))
    device = device or next(target.device for target in TARGETS if target.runtime == name)
    return _RUNTIMES[name](bundle, device=device, threads=threads)
