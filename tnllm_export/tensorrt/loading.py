"""Importing `tensorrt` or `tensorrt_rtx`, and what both need before the first call.

Nothing here is imported before an engine is built or run.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from tnllm_export.errors import EngineBuildError, RuntimeMissingError
from tnllm_export.targets import TARGETS, EngineTarget
from tnllm_export.tensorrt.second_name import open_under

_RTX = "tensorrt_rtx"
_RTX_LIBRARY = "libtensorrt_rtx.so"


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
    try:
        trt = importlib.import_module(target.module)
    except ImportError as error:
        raise RuntimeMissingError(
            f"the package {target.module} can't be imported ({error}); "
            f"install it with: pip install 'tnllm-export[{target.extra}]'"
        ) from error
    if target.module == _RTX:
        _name_library()
    return trt


def check_plugins_are_possible(trt: Any) -> None:
    """Raise EngineBuildError where a plugin would abort the process: see `_name_library`."""
    library = _library() if trt.__name__ == _RTX else None
    if library is None:
        return
    try:
        ctypes.CDLL(_RTX_LIBRARY)
    except OSError as error:
        raise EngineBuildError(
            f"{_RTX} can't open {_RTX_LIBRARY} ({error}), which plugins take; set LD_LIBRARY_PATH to a folder with a "
            f"link {_RTX_LIBRARY} to {library}"
        ) from error


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


@functools.cache
def _name_library() -> None:
    """Let TensorRT-RTX open itself by the name `libtensorrt_rtx.so`.

    Where a graph has a node that a plugin runs, its parser does so, and aborts the process if that fails; its wheel
    has no file of that name. `check_plugins_are_possible` tells whether it worked.
    """
    library = _library()
    if library is not None:
        with contextlib.suppress(OSError):
            open_under(_RTX_LIBRARY, library)


def _library() -> Path | None:
    """Return the wheel's file; nothing elsewhere."""
    spec = importlib.util.find_spec(f"{_RTX}_libs") if sys.platform == "linux" else None
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob(f"{_RTX_LIBRARY}.*"))), None)
