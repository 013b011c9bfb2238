"""Writing files so that they are hashed on the way and never half there, and hashing them again."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tnllm_export.bundle.manifest import FileRecord
from tnllm_export.errors import WriteError

PIECE_BYTES = 1 << 24
"""How much is read, cast, hashed and written at once: enough for full speed, little to hold several of."""

PARTIAL = r"\.partial-\d+-[0-9a-f]{8}"
"""What `temporary_suffix` returns for what is not finished, as a regular expression."""

_PIECES_IN_FLIGHT = 3
_ABANDONED_SECONDS = 3600

_FINDINGS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another path"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another path"),
    errno.EFBIG: ("the file is larger than the system allows", "raise the limit (ulimit -f) or choose another disk"),
    errno.EACCES: ("no permission to write", "choose another path or change the folder's permissions"),
    errno.EPERM: ("no permission to write", "choose another path or change the folder's permissions"),
    errno.EROFS: ("the file system is read-only", "choose another path"),
    errno.EEXIST: ("a part of the path is a file, not a folder", "choose another path"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
}


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        found, remedy = _FINDINGS.get(error.errno or 0, (str(error.strerror or error), "choose another path"))
        raise WriteError(f"{path}: could not be written, {found}; {remedy}") from error


class HashedFile:
    """A new file whose SHA-256 is computed in a second thread while it is written; synced to disk when closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._in_flight: deque[Future[None]] = deque()
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. They must not change until `settle` has returned or three more pieces have been written."""
        view = memoryview(data).cast("B")
        if len(self._in_flight) == _PIECES_IN_FLIGHT:
            self._in_flight.popleft().result()
        self._in_flight.append(self._hasher.submit(self._hash.update, view))
        self._bytes += len(view)
        while view:
            # A raw write may take less than it is given, e.g. the last that fits before the disk is full.
            view = view[self._file.write(view) :]

    def settle(self) -> FileRecord:
        """Wait until all is hashed and on the disk; return checksum and size."""
        while self._in_flight:
            self._in_flight.popleft().result()
        os.fsync(self._file.fileno())
        return FileRecord(sha256=self._hash.hexdigest(), bytes=self._bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        self._file.close()


def lock(folder: Path, *, wait: bool = False) -> int:
    """Lock a folder for as long as this process lives, or the handle that is returned is open.

    Raises:
        OSError: Another process holds it (BlockingIOError, unless this one shall `wait`), or the file system locks no
            folders, as NFS.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change a folder. Where a file system locks none (NFS), all may."""
    handle = None
    with suppress(OSError):
        handle = lock(folder, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def temporary_suffix(role: str = "partial") -> str:
    """Return `.ROLE-PID-RANDOM`, which makes a name that no other writer chooses."""
    return f".{role}-{os.getpid()}-{secrets.token_hex(4)}"


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file that does not exist yet, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(path) as file:
        for piece in pieces:
            file.write(piece)
        return file.settle()


def replace(path: Path, data: bytes) -> FileRecord:
    """Write a file, new or old, such that it is never seen half-written, whoever else writes it."""
    _clear_leftovers(path)
    partial = path.with_name(f".{path.name}{temporary_suffix()}")
    try:
        record = write_new(partial, (data,))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return record


def is_partial(path: Path) -> bool:
    """Whether a file has the name of one that `replace` has not finished."""
    return re.fullmatch(rf"\..+{PARTIAL}", path.name) is not None


def _clear_leftovers(path: Path) -> None:
    """Remove what killed writers of a file have left: what nobody has touched for an hour."""
    pattern = re.compile(rf"\.{re.escape(path.name)}{PARTIAL}")
    with suppress(OSError):
        for leftover in path.parent.iterdir():
            if pattern.fullmatch(leftover.name) and time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Make names that were created or renamed in a folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield a file's content piece by piece."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def hash_file(path: Path, advance: Callable[[int], None]) -> str:
    """Return a file's SHA-256, calling `advance` with the size of each piece that is done."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            advance(size)
    return digest.hexdigest()
