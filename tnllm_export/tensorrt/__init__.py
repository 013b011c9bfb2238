"""What building and running engines share: importing TensorRT, its log, our plugin library."""

from tnllm_export.tensorrt.loading import engine_target, import_tensorrt, last_error, logger
from tnllm_export.tensorrt.plugins import library_checksum, load_plugins

__all__ = [
    "engine_target",
    "import_tensorrt",
    "last_error",
    "library_checksum",
    "load_plugins",
    "logger",
]
