"""A file is written where nothing is, or over one of its own kind; whatever else is there is named and stays."""

import os
from pathlib import Path

import pytest

from tnllm_export.bundle import MANIFEST
from tnllm_export.bundle.outputs import check_output
from tnllm_export.errors import WriteError


def ours(path: Path) -> bool:
    return path.read_text() == "ours"


def refusal(path: Path) -> str:
    with pytest.raises(WriteError) as caught:
        check_output(path, "a thing", ours)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_free_place_and_an_earlier_file_of_the_kind_are_taken(tmp_path: Path) -> None:
    check_output(tmp_path / "new", "a thing", ours)
    check_output(tmp_path / "folders" / "to make" / "new", "a thing", ours)
    (tmp_path / "old").write_text("ours")
    check_output(tmp_path / "old", "a thing", ours)
    (tmp_path / "folder").symlink_to(tmp_path)
    check_output(tmp_path / "folder" / "old", "a thing", ours)
    assert sorted(os.listdir(tmp_path)) == ["folder", "old"]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name, content in (("notes", "mine"), ("empty", "")):
        (tmp_path / name).write_text(content)
        assert "exists already and is not a thing; expected a new file" in refusal(tmp_path / name)
        assert (tmp_path / name).read_text() == content


def test_what_is_no_regular_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "old").write_text("ours")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "dangling").symlink_to("nothing")
    assert "is no regular file" in refusal(tmp_path / "fifo")
    assert "is no regular file" in refusal(Path("/dev/null"))
    assert "is a symbolic link" in refusal(tmp_path / "link")
    assert "is a symbolic link" in refusal(tmp_path / "dangling")
    assert "is a folder" in refusal(tmp_path)


def test_no_place_in_a_bundle_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bundle" / "reports").mkdir(parents=True)
    (tmp_path / "bundle" / MANIFEST).write_text('{"schema_version": 1, "lowering": "", "graphs": {}}')
    (tmp_path / "by another name").symlink_to("bundle")
    for place in ("bundle/new", "bundle/reports/new", "bundle/folder/new", "by another name/new"):
        assert f"lies in the bundle {tmp_path / 'bundle'};" in refusal(tmp_path / place)
    check_output(tmp_path / "bundle" / ".." / "new", "a thing", ours)


def test_a_dash_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "stdout is not written to" in refusal(Path("-"))


def test_a_folder_that_can_not_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("ours")
    assert f"{tmp_path / 'file'} is a file, not a folder" in refusal(tmp_path / "file" / "new")
    assert "the name is too long" in refusal(tmp_path / ("x" * 300))
    # Not by permissions: they don't hold for root.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"no permission to write to {tmp_path};" in refusal(tmp_path / "new")
