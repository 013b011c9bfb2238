"""Writing a large file past the page cache, hashed on the way.

Getting gigabytes of page cache keeps a processor busy for as long as hashing them does, several times as long where
freed memory goes back to a hypervisor, and pushes out what somebody will read. So bytes are gathered in a few aligned
buffers, which go to the disk as they are (O_DIRECT).
"""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tnllm_export.bundle.manifest import FileRecord

BUFFER_BYTES = 1 << 25
_BUFFERS = 6
_WRITERS = 4
"""Writes at once: disks want a queue, and past the cache nobody else makes one."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)  # not everywhere


class DirectFile:
    """A new file; hashed by one thread and written by others, on the disk once settled.

    Where a file system does not write past the cache, or not a piece of this size, the cache is used after all.
    """

    def __init__(self, path: Path) -> None:
        self._handle = _create(path)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._writer = ThreadPoolExecutor(max_workers=_WRITERS, thread_name_prefix="write")
        self._buffers = deque(_Buffer() for _ in range(_BUFFERS))
        self._filled = 0
        self._flushed = 0

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | NDArray[np.uint8]) -> None:
        """Append bytes; they have been copied when this returns.

        Raises:
            OSError: Some of the bytes could not be written, or of those before.
        """
        rest = np.frombuffer(data, dtype=np.uint8)
        while len(rest):
            buffer = self._buffers[0]
            if self._filled == 0:
                buffer.wait()
            size = min(len(rest), BUFFER_BYTES - self._filled)
            # By numpy, which lets other threads run meanwhile: slices of memoryviews don't.
            np.copyto(buffer.bytes[self._filled : self._filled + size], rest[:size])
            self._filled += size
            rest = rest[size:]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def settle(self) -> FileRecord:
        """Wait until all is hashed and on the disk; return checksum and size. Raises OSError."""
        self._flush()
        for buffer in self._buffers:
            buffer.wait()
        os.fsync(self._handle)
        return FileRecord(sha256=self._hash.hexdigest(), bytes=self._flushed)

    def _flush(self) -> None:
        """Hand the first buffer over to the threads; the one that they have had longest is the next."""
        filled = self._buffers[0].bytes[: self._filled].data
        self._buffers[0].tasks = [
            self._hasher.submit(self._hash.update, filled),
            self._writer.submit(_write, self._handle, filled, self._flushed),
        ]
        self._buffers.rotate(-1)
        self._flushed += self._filled
        self._filled = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        os.close(self._handle)


@dataclass(eq=False)
class _Buffer:
    """Memory that starts at a page, and what still reads it."""

    bytes: NDArray[np.uint8] = field(default_factory=lambda: np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=np.uint8))
    tasks: list[Future[Any]] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until nobody does, and raise what has gone wrong."""
        for task in self.tasks:
            task.result()
        self.tasks = []


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # Linux makes the file before it refuses
    return os.open(path, flags, 0o666)


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)  # as they are now: another thread may see an error of its own below
        try:
            written = os.pwrite(handle, data, offset)
        except OSError as error:
            # Past the cache only whole blocks can be written: not the end of most files, nor what follows a write that
            # took less than it was given, e.g. the last that fits before the disk is full.
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~_DIRECT)
        else:
            data, offset = data[written:], offset + written
