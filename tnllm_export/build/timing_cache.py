"""The file in which TensorRT keeps what it measured, from one build to the next."""

from pathlib import Path
from typing import Any

from tnllm_export.bundle import files
from tnllm_export.bundle.outputs import check_output
from tnllm_export.errors import EngineBuildError
from tnllm_export.tensorrt import last_error


def load_timing_cache(trt: Any, config: Any, path: Path) -> Any:
    """Let a build take measured times from a file, which need not be there yet, and return the cache.

    Raises:
        EngineBuildError: TensorRT does not take the file.
        WriteError: The file can't be written, or lies in a bundle, which is better known before a build than after.
    """
    check_output(path, "a timing cache", recognise=lambda _: True)  # TensorRT tells below
    with files.reporting_write_errors(path):
        path.open("ab").close()
        content = path.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineBuildError(
            f"{path}: {trt.__name__} {trt.__version__} does not take this timing cache ({last_error(trt)}); expected "
            "one of the same version and GPU: delete it, or name another file"
        )
    return cache


def save_timing_cache(cache: Any, path: Path) -> None:
    """Write a cache back. Raises WriteError."""
    with files.reporting_write_errors(path):
        files.replace(path, bytes(cache.serialize()))
