"""A file that is replaced is never seen half-written, whoever else replaces it, and nothing else is touched."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tnllm_export.bundle import files


def test_writers_at_the_same_time_leave_one_of_the_files_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.replace(path, bytes(100_000))

    def write(run: int) -> tuple[int, int]:
        files.replace(path, bytes([run]) * 100_000)
        content = path.read_bytes()
        return len(content), len(set(content))

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(write, range(60))) == {(100_000, 1)}
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old = time.time() - 7200
    names = {".file.partial-12-0123abcd": old, ".file.partial-12-0123abce": None, ".file.partial": old}
    for name, changed in names.items():
        (tmp_path / name).touch()
        if changed is not None:
            os.utime(tmp_path / name, (changed, changed))
    files.replace(tmp_path / "file", b"new")
    assert {found.name for found in tmp_path.iterdir()} == {"file", ".file.partial-12-0123abce", ".file.partial"}
