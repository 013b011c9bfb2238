"""Exports that fail or are killed: nothing is half-written, nothing that was there is lost."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from tnllm_export.bundle import Bundle, BundleWriter, WeightsLayout, open_bundle
from tnllm_export.errors import BundleExistsError, WriteError

Write = Callable[..., Bundle]


def test_a_full_disk_is_foreseen(
    place: Path, layout: WeightsLayout, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    message = rf"b: the disk is full: {layout.total_bytes} bytes of weights, 1000 bytes free; free some space"
    with pytest.raises(WriteError, match=message), BundleWriter(place / "b") as writer:
        writer.write_weights(layout, ((name, weights[name]) for name in layout.names))
    assert list(place.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(place: Path, layout: WeightsLayout, weights: dict[str, Tensor]) -> None:
    # The system's own limit on file sizes: real short writes, then a real error, on any machine.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (layout.total_bytes - 10_000, hard))
    try:
        with (
            pytest.raises(WriteError, match=r"place/b: could not .*ulimit") as caught,
            BundleWriter(place / "b") as writer,
        ):
            writer.write_weights(layout, ((name, weights[name]) for name in layout.names))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "found"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EIO, "Input")],
)
def test_every_write_error_is_one_line_with_a_remedy(
    place: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch, number: int, found: str
) -> None:
    def failing(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(WriteError, match=rf"place/b: could not be written, .*{found}.*; .* another path") as caught:
        write_bundle(place / "b")
    assert "\n" not in str(caught.value)
    assert list(place.iterdir()) == []


def test_a_place_below_a_file_is_refused(place: Path, write_bundle: Write) -> None:
    (place / "file").touch()
    with pytest.raises(WriteError, match=r"file/b: could not be written"):
        write_bundle(place / "file" / "b")


KILLED = """
import sys, torch
from pathlib import Path
from tnllm_export.bundle import BundleWriter, TensorSpec, plan_weights
layout = plan_weights([TensorSpec("a", "float32", (9, 999)), TensorSpec("b", "float32", (9,))])
def tensors():
    yield layout.names[0], torch.zeros(layout.weights[layout.names[0]].spec.shape)
    print("half-way", flush=True)
    sys.stdin.read()
with BundleWriter(Path(sys.argv[1]), overwrite=True) as writer:
    writer.write_weights(layout, tensors())
"""


@pytest.fixture
def half_way(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An export to `place/b` by another process, stopped in the middle of its weights."""
    command = [sys.executable, "-c", KILLED, str(place / "b")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half-way\n"
        yield process
        process.kill()


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(
    place: Path, write_bundle: Write, half_way: subprocess.Popen[bytes]
) -> None:
    half_way.kill()
    half_way.wait()
    (leftover,) = place.iterdir()
    assert leftover.name.startswith(f".b.partial-{half_way.pid}-")
    assert [path.name for path in leftover.iterdir()] == ["weights.safetensors"]
    neighbour = place / ".c.partial-1-0"
    neighbour.mkdir()
    bundle = write_bundle(place / "b")
    assert open_bundle(place / "b") == bundle
    assert sorted(path.name for path in place.iterdir()) == [neighbour.name, "b"]


def test_a_killed_overwrite_leaves_the_old_bundle(
    place: Path, write_bundle: Write, half_way: subprocess.Popen[bytes]
) -> None:
    old = write_bundle(place / "b")
    half_way.kill()
    half_way.wait()
    assert open_bundle(place / "b") == old


def test_an_export_that_still_runs_is_left_alone(
    place: Path, write_bundle: Write, half_way: subprocess.Popen[bytes]
) -> None:
    write_bundle(place / "b")
    names = sorted(path.name for path in place.iterdir())
    assert len(names) == 2
    assert names[0].startswith(f".b.partial-{half_way.pid}-")


def test_without_locks_bundles_are_written_and_nothing_is_taken_for_abandoned(
    place: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        # What NFS answers for a folder.
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("fcntl.flock", refuse)
    leftover = place / ".b.partial-1-abcd0123"
    leftover.mkdir()
    assert open_bundle(write_bundle(place / "b").path)
    assert sorted(path.name for path in place.iterdir()) == [leftover.name, "b"]


def test_a_bundle_that_lost_its_place_is_put_back(place: Path, write_bundle: Write) -> None:
    # What a kill between an overwrite's two renames leaves.
    old = write_bundle(place / "b")
    (place / "b").rename(place / ".b.old-1-00ff")
    with BundleWriter(place / "b", overwrite=True):
        assert open_bundle(place / "b").manifest == old.manifest
    assert [path.name for path in place.iterdir()] == ["b"]


def test_an_old_bundle_that_was_replaced_is_removed(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "b")
    write_bundle(place / ".b.old-1-00ff")
    write_bundle(place / "b", overwrite=True)
    assert [path.name for path in place.iterdir()] == ["b"]


def test_a_bundle_that_is_back_in_its_place_counts_as_existing(place: Path, write_bundle: Write) -> None:
    old = write_bundle(place / "b")
    (place / "b").rename(place / ".b.old-1-00ff")
    with pytest.raises(BundleExistsError):
        write_bundle(place / "b")
    assert open_bundle(place / "b") == old
