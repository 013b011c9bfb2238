"""Linking packages against the C++ standard library that PyTorch runs on, whatever the compiler would take.

A compiler that finds libstdc++ as an archive only, or is made to link it statically, puts a copy of it into each
package. A process that loads such a package beside PyTorch's own libstdc++ crashes.
"""
# ruff: noqa: PLC0415 - Inductor is imported when there is something to compile

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SONAME = "libstdc++.so.6"
_MAPS = Path("/proc/self/maps")


@contextlib.contextmanager
def linking_the_loaded_library() -> Iterator[dict[str, Any]]:
    """Yield settings of Inductor by which packages are linked with the libstdc++ of this process, while this lasts.

    It is named before what the compiler adds by itself, so that nothing it has is taken from an archive.
    """
    from torch._inductor import config

    library = loaded_library()
    if library is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="tnllm-") as folder, _searching(folder):
        (Path(folder) / SONAME).symlink_to(library)
        yield {"aot_inductor.custom_op_libs": [*(config.aot_inductor.custom_op_libs or []), f":{SONAME}"]}


def loaded_library() -> Path | None:
    """Return the file of the libstdc++ that is loaded in this process, or nothing where that can't be known."""
    with contextlib.suppress(OSError):
        found = re.search(rf"(/\S.*/{re.escape(SONAME)}[.\d]*)$", _MAPS.read_text(), re.MULTILINE)
        return Path(found[1]) if found else None
    return None


@contextlib.contextmanager
def _searching(folder: str) -> Iterator[None]:
    """Let linkers look for libraries in a folder, for a while."""
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = os.pathsep.join([folder, *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before
