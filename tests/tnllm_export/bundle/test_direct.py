"""Files written past the page cache hold what was written, with the right checksum, wherever they lie."""

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from tnllm_export.bundle import direct
from tnllm_export.bundle.direct import DirectFile


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> int:
    """Four buffers of one page each, so that a little data goes round them often."""
    monkeypatch.setattr(direct, "BUFFER_BYTES", 4096)
    return 4096


def pieces(*sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def assert_written(path: Path, data: list[np.ndarray]) -> None:
    with DirectFile(path) as file:
        for piece in data:
            file.write(piece)
            piece[:] = 0  # has been copied
        record = file.settle()
    content = path.read_bytes()
    assert record.bytes == len(content) == sum(map(len, data))
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    expected = pieces(*map(len, data))
    assert content == b"".join(piece.tobytes() for piece in expected)


@pytest.mark.parametrize(
    "sizes", [(), (1,), (4096,), (4095, 2), (100_000,), (1, 4096 * 9, 17, 4096), (5000,) * 50], ids=str
)
def test_any_sizes_are_written_whole_and_in_order(tmp_path: Path, small_buffers: int, sizes: tuple[int, ...]) -> None:
    assert_written(tmp_path / "file", pieces(*sizes))


def test_large_buffers(tmp_path: Path) -> None:
    assert_written(tmp_path / "file", pieces(direct.BUFFER_BYTES + 4096, 77))


def test_a_file_system_that_refuses_to_open_gets_ordinary_writes(
    tmp_path: Path, small_buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        handle = real(path, flags & ~direct._DIRECT, mode)
        if flags & direct._DIRECT:
            os.close(handle)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return handle

    monkeypatch.setattr(os, "open", refusing)
    assert_written(tmp_path / "file", pieces(10_000, 1))


def test_a_file_system_that_refuses_to_write_gets_ordinary_writes(
    tmp_path: Path, small_buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, []

    def refusing(handle: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & direct._DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(handle, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    assert_written(tmp_path / "file", pieces(10_000, 1))
    assert refused


def test_an_existing_file_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_is_reported_while_writing(
    tmp_path: Path, small_buffers: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(handle: int, data: memoryview, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", failing)
    with DirectFile(tmp_path / "file") as file:
        writes = (file.write(piece) for piece in pieces(*[4096] * 20))
        with pytest.raises(OSError, match=os.strerror(number)):
            list(writes)
