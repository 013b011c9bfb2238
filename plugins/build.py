"""From compute capabilities and head sizes to a plugin library: compile the kernels, then the library around them."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tnllm_export.errors import PluginBuildError, WriteError
from tnllm_export.kernels.compile import compile_table
from tnllm_export.plugins.library import build_library, check_cache, find_compiler, find_headers
from tnllm_export.progress import Progress, silent

CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""What kernels can be compiled for."""

DTYPES = ("float32", "float16", "bfloat16")

RELEASED_HEAD_SIZES = ((256, 128), (128, 128))
"""K and V of every released model: in the layer with LRPE, and in the others."""


@dataclass(frozen=True)
class PluginOptions:
    """What a plugin library shall run.

    Attributes:
        capabilities: Compute capabilities, 86 for 8.6.
        head_sizes: Pairs of K and V.
        dtypes: Of activations.
    """

    capabilities: tuple[int, ...] = CAPABILITIES
    head_sizes: tuple[tuple[int, int], ...] = RELEASED_HEAD_SIZES
    dtypes: tuple[str, ...] = DTYPES

    def __post_init__(self) -> None:
        for found, known in ((self.capabilities, CAPABILITIES), (self.dtypes, DTYPES)):
            unknown = [str(item) for item in found if item not in known]
            if unknown or not found:
                raise PluginBuildError(
                    f"kernels can't be compiled for {', '.join(unknown) or 'nothing'}; "
                    f"expected some of {', '.join(map(str, known))}"
                )
        for K, V in self.head_sizes:
            if K % 16 or V % 16 or not 16 <= K <= 256 or not 16 <= V <= 256:
                raise PluginBuildError(f"head size is {K}x{V}; expected K and V to be multiples of 16, up to 256")


def build_plugin(
    options: PluginOptions, *, output: Path | None = None, include: Path | None = None, progress: Progress = silent
) -> Path:
    """Compile the kernels and the library; no GPU is needed.

    Args:
        options: What it shall run.
        output: Where the library shall be copied to; default: it stays in the cache.
        include: Folder with TensorRT's headers.
        progress: Told what is being compiled.

    Returns:
        The library's path.

    Raises:
        PluginBuildError: No compiler, no headers, no Triton, or an error of a compiler.
        WriteError: The cache or `output` can't be written.
    """
    # What is missing is told before minutes are spent on kernels.
    find_compiler()
    find_headers(include)
    check_cache()
    table = compile_table(options.capabilities, options.head_sizes, options.dtypes, progress=progress)
    progress("compiling the plugin library", 0, 1)
    library = build_library(table, include=include)
    progress("compiling the plugin library", 1, 1)
    if output is None:
        return library
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, partial)
        return partial.replace(output)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise WriteError(f"{output}: could not be written, {error.strerror}; choose another path") from error
