"""Running a bundle. Importing this package imports no optional runtime."""

from tnllm_export.runtime.protocol import Runtime, RuntimeInfo, State
from tnllm_export.runtime.registry import load_runtime
from tnllm_export.runtime.torch import TorchRuntime

__all__ = ["Runtime", "RuntimeInfo", "State", "TorchRuntime", "load_runtime"]
