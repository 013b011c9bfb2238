"""Making the plugin library: a table of compiled kernels and our C++ sources go through g++, without CUDA and a GPU.

The seam to the kernels is `tnllm_export.kernels.compiled`: ahead-of-time compilation gives a `KernelTable`, whose rows
hold the code, the sizes it was compiled for, and the names of the arguments that it takes, in order. The launcher
(`src/launch.cpp`) knows where each name's value comes from; which row a call takes, how many segments it is cut into
and how much workspace it needs is `src/plan.cpp`, which follows `kernels/lightning_attention/sweep_plan.py` and
`step_plan.py`. So a kernel may gain, lose or reorder arguments of the known names without a change in C++.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tnllm_export.errors import PluginBuildError, WriteError
from tnllm_export.kernels.compiled import DESCRIPTION, KernelTable
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION_STEP
from tnllm_export.plugins.table import TABLE, write_table

SOURCES = Path(__file__).parent / "src"
HEADER = "NvInferRuntime.h"
INCLUDE_VARIABLE = "TENSORRT_INCLUDE_DIR"
LIBRARY = "libtnllm_plugins.so"

_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread")
_OLDEST = (10, 3)


def default_cache() -> Path:
    """Return the folder in which libraries are kept: `tnllm` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tnllm"


def build_library(
    table: KernelTable, *, include: Path | None = None, compiler: str | None = None, cache: Path | None = None
) -> Path:
    """Compile the plugin library, or take it from the cache: the same kernels, sources, headers and compiler.

    Args:
        table: The kernels.
        include: Folder with TensorRT's headers; default: the variable TENSORRT_INCLUDE_DIR, else those that the
            package kernel-lens carries.
        compiler: A C++17 compiler; default: the variable CXX, else g++.
        cache: Where libraries are kept.

    Returns:
        The library's path in the cache.

    Raises:
        PluginBuildError: No compiler, no headers, headers that are too old, or an error of the compiler.
        WriteError: The cache can't be written.
    """
    compiler = find_compiler(compiler)
    headers = find_headers(include)
    cache = cache or default_cache()
    with _building(cache) as folder:
        write_table(table, folder)
        place = cache / f"plugins-{_digest(folder, headers, compiler)}" / LIBRARY
        if not place.is_file():
            _compile(compiler, headers, folder)
            place.parent.mkdir(exist_ok=True)
            (folder / LIBRARY).replace(place)
    return place


def is_library(path: Path) -> bool:
    """Whether a file looks like a plugin library: machine code that names our plugins."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content.startswith(b"\x7fELF") and LIGHTNING_ATTENTION_STEP.onnx_name.encode() in content


def kernels_of(path: Path) -> frozenset[tuple[int, str, int, int]] | None:
    """Return the kernels that a library names, by compute capability, dtype, K and V; None where it names none.

    Raises:
        OSError: It can't be read.
    """
    found = re.search(re.escape(DESCRIPTION.encode()) + rb"([\w ,]+)\0", path.read_bytes())
    if found is None:
        return None
    rows = re.findall(r"(\d+) (\w+) (\d+)x(\d+)", found[1].decode())
    return frozenset((int(capability), dtype, int(K), int(V)) for capability, dtype, K, V in rows)


def check_cache() -> None:
    """Raise WriteError where the cache can't be written."""
    with _building(default_cache()):
        pass


@contextmanager
def _building(cache: Path) -> Iterator[Path]:
    """Give a temporary folder in the cache; errors of writing there become WriteError."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as name:
            yield Path(name)
    except OSError as error:
        raise WriteError(f"{cache}: could not be written, {error.strerror}; set XDG_CACHE_HOME to a folder") from error


def find_compiler(wanted: str | None = None) -> str:
    """Return the path of the C++ compiler. Raises PluginBuildError where there is none."""
    name = wanted or os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise PluginBuildError(f"no C++ compiler {name}; install g++, or name another with the variable CXX")
    return found


def find_headers(include: Path | None = None) -> Path:
    """Return the folder of TensorRT's headers.

    Raises:
        PluginBuildError: There is none, or its headers are too old for `IPluginV3`.
    """
    named = include or (Path(os.environ[INCLUDE_VARIABLE]) if os.environ.get(INCLUDE_VARIABLE) else None)
    folder = named or _carried_headers()
    if folder is None or not (folder / HEADER).is_file():
        where = f"{folder}: no {HEADER}" if folder else "TensorRT's headers are not installed"
        raise PluginBuildError(
            f"{where}; name their folder with --include or {INCLUDE_VARIABLE}, or: pip install kernel-lens"
        )
    version = _header_version(folder)
    if version < _OLDEST:
        raise PluginBuildError(
            f"{folder}: headers of TensorRT {version[0]}.{version[1]}; expected {_OLDEST[0]}.{_OLDEST[1]} or newer"
        )
    return folder


def _carried_headers() -> Path | None:
    spec = find_spec("kernel_lens")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "include" / "tensorrt"


def _header_version(folder: Path) -> tuple[int, int]:
    path = folder / "NvInferVersion.h"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = dict(re.findall(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR)(?:_ENTERPRISE)? (\d+)", text))
    return int(found.get("MAJOR", 0)), int(found.get("MINOR", 0))


def _digest(folder: Path, headers: Path, compiler: str) -> str:
    """Hash all that goes into a library."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.rglob("*.*"), *headers.glob("*.h"), *folder.iterdir()]):
        digest.update(f"{path.name}\0".encode())
        # The folder's own name, which the table holds, is another one each time.
        digest.update(path.read_bytes().replace(str(folder).encode(), b""))
    digest.update(repr((_FLAGS, _compiler_version(compiler))).encode())
    return digest.hexdigest()[:16]


@functools.cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(compiler: str, headers: Path, folder: Path) -> None:
    command = [
        compiler,
        *_FLAGS,
        f"-I{SOURCES}",
        "-isystem",
        str(headers),
        "-idirafter",
        str(SOURCES / "stub"),
        *map(str, sorted(SOURCES.glob("*.cpp"))),
        str(folder / TABLE),
        "-o",
        str(folder / LIBRARY),
        "-Wl,-z,defs",  # a symbol that nobody defines is an error now, not when the library is loaded
        "-ldl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no word"]
        )
        raise PluginBuildError(
            f"{compiler} could not compile the plugin library ({lines[0].strip()}); "
            "expected a C++17 compiler and headers of TensorRT 10.3 or newer"
        )
