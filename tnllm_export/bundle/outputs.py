"""Where a single file may be written: never over what something else has made, never into a bundle."""

import os
from collections.abc import Callable
from pathlib import Path

from tnllm_export.bundle.files import reporting_write_errors
from tnllm_export.bundle.reader import bundle_around
from tnllm_export.errors import WriteError


def check_output(path: Path, kind: str, recognise: Callable[[Path], bool]) -> None:
    """Raise WriteError unless `path` is free, or holds an earlier file of the same kind, which may be replaced.

    Symbolic links are refused: replacing one would leave the file that it names as it was.

    Args:
        path: Where a file shall be written.
        kind: What is written, as in "a saved state".
        recognise: Whether the regular file at a path is of this kind.
    """
    with reporting_write_errors(path):
        found = _obstacle(path, kind, recognise)
    if found is not None:
        raise WriteError(f"{path}: {found}; expected a new file, or {kind} to replace: choose another path")


def _obstacle(path: Path, kind: str, recognise: Callable[[Path], bool]) -> str | None:
    if str(path) == "-":
        return "stdout is not written to"
    if path.is_symlink():
        return "is a symbolic link"
    if path.is_dir():
        return "is a folder"
    if path.exists() and not path.is_file():
        return "is no regular file"
    if path.exists() and not recognise(path):
        return f"exists already and is not {kind}"
    return _obstacle_around(path.parent.resolve())


def _obstacle_around(folder: Path) -> str | None:
    bundle = bundle_around(folder)
    if bundle is not None:
        return f"lies in the bundle {bundle}"
    existing = next(found for found in (folder, *folder.parents) if found.exists())
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    return None if os.access(existing, os.W_OK) else f"no permission to write to {existing}"
