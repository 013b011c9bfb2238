"""Importing `tensorrt` or `tensorrt_rtx`, and what both need before the first call.

Nothing here is imported before an engine is built or run.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tnllm_export.errors import EngineBuildError, RuntimeMissingError
from tnllm_export.targets import TARGETS, EngineTarget

_RTX = "tensorrt_rtx"
_RTX_LIBRARY = "libtensorrt_rtx.so"
_RTX_PARSER = "libtensorrt_onnxparser_rtx.so"


def engine_target(name: str) -> EngineTarget:
    """Return how the engines of the target `name` are built. Raises EngineBuildError where it has none."""
    found = {target.name: target.engine for target in TARGETS if target.engine is not None}
    if name not in found:
        raise EngineBuildError(f"target is {name!r}; engines are built for: {', '.join(found)}")
    return found[name]


def import_tensorrt(target: EngineTarget) -> Any:
    """Import a target's package.

    Raises:
        RuntimeMissingError: It is not installed.
    """
    if target.module == _RTX and target.module not in sys.modules:
        _make_findable()
    try:
        return importlib.import_module(target.module)
    except ImportError as error:
        raise RuntimeMissingError(
            f"the package {target.module} can't be imported ({error}); "
            f"install it with: pip install 'tnllm-export[{target.extra}]'"
        ) from error


def check_plugins_are_possible(trt: Any) -> None:
    """Raise EngineBuildError where a plugin would abort the process: see `_make_findable`."""
    if trt.__name__ != _RTX or not _libraries() or _findable():
        return
    raise EngineBuildError(
        f"{_RTX} was imported before this package, so plugins can't find {_RTX_LIBRARY}; import tnllm_export.api and "
        f"build first, or set LD_LIBRARY_PATH to a folder with a link {_RTX_LIBRARY} to {_libraries()[_RTX_LIBRARY]}"
    )


def has_cuda_driver() -> bool:
    """Whether the CUDA driver's library can be opened here."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False


@functools.cache
def logger(trt: Any) -> Any:
    """Return the one logger of a package, a `trt.ILogger` with a list `errors`.

    TensorRT keeps the first logger that it is given for the rest of the process.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        """Collects errors, since the exceptions of TensorRT's API say nothing, and drops the rest."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Take a message."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def last_error(trt: Any) -> str:
    """Return the first error since the last call, in one line, and forget them all."""
    errors: list[str] = logger(trt).errors
    # What is logged first is the cause, the rest how it travelled up; a word of our own plugins says most.
    telling = [*(text for text in errors if text.startswith("tnllm::")), *(text for text in errors if "rror" in text)]
    first = next(iter([*telling, *errors]), "")
    errors.clear()
    return " ".join(first.split()) or "no reason given"


_farm: Path | None = None


def _make_findable() -> None:
    """Let TensorRT-RTX open itself by the name `libtensorrt_rtx.so`.

    With a plugin in the network it does so, and aborts the process where that fails; its wheel has no file of that
    name. The libraries look beside themselves (rpath $ORIGIN), and "beside" is the folder that they were opened from:
    so they are opened through links in a temporary folder, before anybody opens them where they are. The package's
    own folder may be read-only.
    """
    global _farm  # noqa: PLW0603 - a process has one set of libraries
    libraries = _libraries()
    if _farm is not None or not libraries:
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="tnllm-tensorrt-"))
    except OSError:
        return  # engines without plugins need no link; `check_plugins_are_possible` speaks for the others
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, path in libraries.items():
        (folder / path.name).symlink_to(path)
        (folder / name).symlink_to(path)
        ctypes.CDLL(str(folder / path.name), mode=ctypes.RTLD_GLOBAL)
    _farm = folder


def _findable() -> bool:
    if _farm is not None or _libraries()[_RTX_LIBRARY].with_name(_RTX_LIBRARY).exists():
        return True
    with contextlib.suppress(OSError):
        ctypes.CDLL(_RTX_LIBRARY)
        return True
    return False


@functools.cache
def _libraries() -> dict[str, Path]:
    """Return the files of the wheel by the names they lack, the first to be opened first; nothing elsewhere."""
    spec = importlib.util.find_spec(f"{_RTX}_libs") if sys.platform == "linux" else None
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent
    found = {name: next(iter(sorted(folder.glob(f"{name}.*"))), None) for name in (_RTX_LIBRARY, _RTX_PARSER)}
    return {} if None in found.values() else {name: path for name, path in found.items() if path is not None}
