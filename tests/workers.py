"""What the processes of one test run share."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def shared_folder(base: Path) -> Path:
    """Return a folder that all workers of a test run share: each worker's own base is inside it."""
    return base.parent if base.name.startswith("popen-") else base


@contextmanager
def shared_device(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Use a device beside other processes, or alone; locks in `folder` say who does. A process that dies leaves."""
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        # Whoever waits to be alone lets nobody else in.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
