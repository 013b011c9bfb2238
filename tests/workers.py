"""What the processes of one test run share."""

from pathlib import Path


def shared_folder(base: Path) -> Path:
    """Return a folder that all workers of a test run share: each worker's own base is inside it."""
    return base.parent if base.name.startswith("popen-") else base
