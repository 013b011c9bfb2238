"""Registering our plugin library with TensorRT."""

import hashlib
from pathlib import Path
from typing import Any

from tnllm_export.errors import EngineBuildError
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE
from tnllm_export.tensorrt.loading import check_plugins_are_possible, last_error

PLUGINS = (LIGHTNING_ATTENTION.onnx_name, LIGHTNING_ATTENTION_STEP.onnx_name)
VERSION = "1"

_loaded: dict[tuple[str, str], Path] = {}


def library_checksum(path: Path) -> str:
    """Return the checksum of a plugin library. Raises EngineBuildError where there is none."""
    if not path.is_file():
        raise EngineBuildError(f"{path}: no such file; make a plugin library with `tnllm build-plugin`")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_plugins(trt: Any, path: Path) -> None:
    """Register a library's plugins, once per process.

    Raises:
        EngineBuildError: It can't be loaded, holds none of our plugins, or another one was loaded before.
    """
    check_plugins_are_possible(trt)
    digest = library_checksum(path)
    if (trt.__name__, digest) in _loaded:
        return
    if any(name == trt.__name__ for name, _ in _loaded):
        raise EngineBuildError(f"{path}: another plugin library is in use in this process; take a new one")
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(path.resolve()))
    missing = [name for name in PLUGINS if registry.get_creator(name, VERSION, NAMESPACE) is None]
    if handle is None or missing:
        found = f"finds no plugin {' and '.join(missing)} of ours in it" if missing else "can't load it"
        raise EngineBuildError(
            f"{path}: {trt.__name__} {trt.__version__} {found} ({last_error(trt)}); make the library again with "
            "`tnllm build-plugin`"
        )
    _loaded[trt.__name__, digest] = path
