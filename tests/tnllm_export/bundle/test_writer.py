"""Writing bundles: all or nothing, whatever happens, and nothing of anybody else's is ever touched."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tnllm_export.bundle import Bundle, BundleWriter, Manifest, TensorSpec, WeightsLayout, open_bundle, plan_weights
from tnllm_export.errors import BundleExistsError, NonFiniteWeightsError, WriteError

Write = Callable[..., Bundle]


def test_weights_are_cast_and_written_where_they_were_planned(
    place: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tnllm_export.bundle.writer._PIECE_BYTES", 1 << 20)
    torch.manual_seed(1)
    tensors = {"big": torch.randn(2100, 2003), "t": torch.randn(3, 5).t(), "scalar": torch.tensor(7.0)}
    layout = plan_weights(
        [
            TensorSpec("big", "bfloat16", (2100, 2003)),  # more than one piece
            TensorSpec("t", "float32", (5, 3)),
            TensorSpec("scalar", "float16", ()),
        ]
    )
    seen: list[tuple[int, int]] = []
    with BundleWriter(place / "b") as writer:
        writer.write_weights(
            layout,
            ((name, tensors[name]) for name in layout.names),
            lambda stage, done, total, unit="": seen.append((done, total)),
        )
        for name in ("prefill.onnx", "decode.onnx", "tokenizer.model"):
            writer.write_bytes(name, b"")
        bundle = writer.commit(manifest)
    loaded = load_file(bundle.weights_path)
    assert torch.equal(loaded["big"], tensors["big"].bfloat16())
    assert torch.equal(loaded["t"], tensors["t"])
    assert torch.equal(loaded["scalar"], tensors["scalar"].half())
    assert seen[-1] == (layout.total_bytes, layout.total_bytes)
    assert len(seen) > len(tensors)
    assert open_bundle(place / "b") == bundle


def test_the_same_input_gives_the_same_bytes(place: Path, write_bundle: Write) -> None:
    one, two = write_bundle(place / "one"), write_bundle(place / "two")
    assert one.manifest == two.manifest
    assert (place / "one/manifest.json").read_bytes() == (place / "two/manifest.json").read_bytes()


def test_missing_parents_are_made(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "a" / "b" / "c")
    assert open_bundle(place / "a" / "b" / "c")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    place: Path, layout: WeightsLayout, weights: dict[str, Tensor], value: float
) -> None:
    name = layout.names[3]
    weights[name].view(-1)[-1] = value
    with pytest.raises(NonFiniteWeightsError, match=name), BundleWriter(place / "b") as writer:
        writer.write_weights(layout, ((name, weights[name]) for name in layout.names))
    assert list(place.iterdir()) == []


def test_weights_that_do_not_fit_the_layout_are_a_programming_error(
    place: Path, layout: WeightsLayout, weights: dict[str, Tensor]
) -> None:
    reordered = ((name, weights[name]) for name in reversed(layout.names))
    with pytest.raises(ValueError, match="the layout has"), BundleWriter(place / "b") as writer:
        writer.write_weights(layout, reordered)
    with pytest.raises(ValueError, match="zip"), BundleWriter(place / "b") as writer:
        writer.write_weights(layout, iter(()))
    assert list(place.iterdir()) == []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_bundle_is_refused_before_any_work_and_left_alone(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "b")
    before = snapshot(place)
    with pytest.raises(BundleExistsError, match="--overwrite"):
        BundleWriter(place / "b")
    assert snapshot(place) == before


def test_a_bundle_is_overwritten_when_asked(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "b").add_reports({"ok": True}, {"parity.json": b"1"})
    bundle = write_bundle(place / "b", overwrite=True, decode=b"new")
    assert open_bundle(place / "b") == bundle
    assert bundle.decode_path.read_bytes() == b"new"
    assert not (place / "b" / "reports").exists()
    assert [path.name for path in place.iterdir()] == ["b"]


def test_a_damaged_bundle_may_be_overwritten(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "b").decode_path.unlink()
    write_bundle(place / "b", overwrite=True)
    assert open_bundle(place / "b")


def test_a_bundle_that_may_not_be_removed_is_not_overwritten(
    place: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = write_bundle(place / "b").path / "engines"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)  # root may write anywhere
    with pytest.raises(BundleExistsError, match=r"no permission to write to .*b/engines, so it is not overwritten"):
        BundleWriter(place / "b", overwrite=True)
    assert [path.name for path in place.iterdir()] == ["b"]


@pytest.mark.parametrize("manifest", [None, "{}", "not json", '{"manifest_version": 3, "name": "an extension"}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_bundle_is_never_overwritten(place: Path, manifest: str | None, overwrite: bool) -> None:
    home = place / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (home / "manifest.json").write_text(manifest)
    before = snapshot(place)
    with pytest.raises(BundleExistsError, match=str(home)):
        BundleWriter(home, overwrite)
    assert snapshot(place) == before


def test_a_file_is_never_overwritten(place: Path) -> None:
    (place / "b").write_text("a file")
    with pytest.raises(BundleExistsError):
        BundleWriter(place / "b", overwrite=True)
    assert (place / "b").read_text() == "a file"


FOREIGN = (
    *(
        "notes.txt",
        "reports/notes.txt",
        "engines/notes.txt",
        "notes.partial",
        "engines/tensorrt-rtx/0123456789abcdef/a",
    ),
    *("engines/tensorrt-rtx/mine/prefill.engine", "reports/.notes.txt.partial", "reports/deeper/parity.json"),
)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_bundle_with_somebody_elses_files_in_it_is_not_overwritten(
    place: Path, write_bundle: Write, name: str
) -> None:
    write_bundle(place / "b")
    mine = place / "b" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(BundleExistsError, match=re.escape(f"no part of the bundle ({name})")):
        BundleWriter(place / "b", overwrite=True)
    assert mine.read_text() == "mine"


def test_a_bundle_with_a_link_to_somebody_elses_folder_in_it_is_not_overwritten(
    place: Path, write_bundle: Write
) -> None:
    write_bundle(place / "b")
    (place / "mine").mkdir()
    (place / "b" / "engines").symlink_to(place / "mine")
    with pytest.raises(BundleExistsError, match=r"no part of the bundle \(engines\)"):
        BundleWriter(place / "b", overwrite=True)


def test_what_other_commands_add_goes_with_the_bundle(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "b")
    for name in (
        *("reports/parity.json", "reports/.parity.html.partial-12-0123abcd", ".manifest.json.partial-12-0123abcd"),
        *(
            f"engines/tensorrt-rtx/0123456789abcdef/{name}"
            for name in ("engines.json", "decode.engine", "decode-8.6.cache")
        ),
        *(f"engines/aotinductor/0123456789abcdef/{name}" for name in ("prefill.pt2", "constants.safetensors")),
        "engines/tensorrt-rtx/0123456789abcdef.partial-12-0123abcd/prefill.engine",
    ):
        (place / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "b" / name).touch()
    write_bundle(place / "b", overwrite=True)
    assert not (place / "b" / "engines").exists()


def test_a_name_of_other_bytes_is_refused_before_the_work(place: Path) -> None:
    with pytest.raises(WriteError, match="no UTF-8"):
        BundleWriter(place / "\udcff")


@pytest.mark.parametrize("inside", ["c", "reports/c", "engines/deeper/c"])
def test_no_bundle_is_put_into_another(place: Path, write_bundle: Write, inside: str) -> None:
    old = write_bundle(place / "b")
    with pytest.raises(BundleExistsError, match=re.escape(f"lies in the bundle {place / 'b'}")):
        BundleWriter(place / "b" / inside)
    assert open_bundle(place / "b") == old


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_export_that_takes_the_place_first_is_replaced_or_left(
    place: Path, write_bundle: Write, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    real, others = Path.rename, []

    def slow(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not others:
            others.append(None)
            others[0] = write_bundle(place / "b", overwrite=overwrite, decode=b"another")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", slow)
    if overwrite:
        write_bundle(place / "b", overwrite=True)
        write_bundle(place / "b", overwrite=True)
        assert open_bundle(place / "b").decode_path.read_bytes() == b"decode graph"
    else:
        with pytest.raises(BundleExistsError):
            write_bundle(place / "b")
        assert open_bundle(place / "b") == others[0]
    assert [path.name for path in place.iterdir()] == ["b"]


def test_an_overwrite_that_fails_leaves_the_old_bundle(place: Path, write_bundle: Write) -> None:
    old = write_bundle(place / "b")
    (place / "in-the-way").touch()
    with pytest.raises(WriteError), BundleWriter(place / "b", overwrite=True) as writer:
        writer.copy_file(place / "in-the-way" / "tokenizer.model", "tokenizer.model")
    (place / "in-the-way").unlink()
    assert open_bundle(place / "b") == old
    assert [path.name for path in place.iterdir()] == ["b"]


def test_an_overwrite_that_fails_at_the_last_rename_puts_the_old_bundle_back(
    place: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_bundle(place / "b")
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WriteError, match="Input/output error"):
        write_bundle(place / "b", overwrite=True)
    assert open_bundle(place / "b") == old
    assert [path.name for path in place.iterdir()] == ["b"]


def test_a_bundle_that_appears_meanwhile_is_not_overwritten(
    place: Path, write_bundle: Write, manifest: Manifest
) -> None:
    with BundleWriter(place / "b") as writer:
        other = write_bundle(place / "b")
        with pytest.raises(BundleExistsError):
            writer.commit(manifest)
    assert open_bundle(place / "b") == other


def test_names_stay_inside_the_bundle(place: Path) -> None:
    with BundleWriter(place / "b") as writer, pytest.raises(ValueError, match="no plain path"):
        writer.write_bytes("../escaped", b"")
    assert list(place.iterdir()) == []


def test_a_link_to_a_bundle_stays_a_link(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "real")
    (place / "link").symlink_to(place / "real")
    write_bundle(place / "link", overwrite=True, decode=b"new")
    assert (place / "link").is_symlink()
    assert open_bundle(place / "real").decode_path.read_bytes() == b"new"


def test_checksums_are_right_although_tensors_go_away_at_once(place: Path, write_bundle: Write) -> None:
    layout = plan_weights([TensorSpec(f"t{i}", "float32", (1 << 20,)) for i in range(8)])
    manifest = write_bundle(place / "other").manifest
    with BundleWriter(place / "b") as writer:
        writer.write_weights(layout, ((name, torch.full((1 << 20,), float(i))) for i, name in enumerate(layout.names)))
        for name in ("prefill.onnx", "decode.onnx", "tokenizer.model"):
            writer.write_bytes(name, b"")
        bundle = writer.commit(manifest)
    assert open_bundle(place / "b", check=True) == bundle
