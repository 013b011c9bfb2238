"""Opening bundles: whole ones open, damaged ones are refused by the name of the file."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tnllm_export.bundle import Bundle, WeightsLayout, is_bundle, open_bundle
from tnllm_export.errors import BundleCorruptError, BundleNotFoundError, WriteError
from tnllm_export.models.checkpoint import load_model

Write = Callable[..., Bundle]


def test_a_written_bundle_opens(place: Path, write_bundle: Write, layout: WeightsLayout) -> None:
    written = write_bundle(place / "b")
    opened = open_bundle(place / "b")
    assert opened == written
    assert opened.prefill_path.read_bytes() == b"prefill graph"
    assert opened.decode_path.read_bytes() == b"decode graph"
    assert opened.tokenizer_path is not None
    assert opened.tokenizer_path.read_bytes() == b"pieces"
    assert opened.weights_layout() == layout
    assert is_bundle(place / "b")


def test_nothing_in_a_bundle_says_where_it_was_made(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "b")
    assert str(place) not in (place / "b" / "manifest.json").read_text()


def test_the_eager_model_loads_from_a_bundle(place: Path, write_bundle: Write, weights: dict[str, Tensor]) -> None:
    checkpoint = write_bundle(place / "b").checkpoint()
    assert checkpoint.tokenizer_path == place / "b" / "tokenizer.model"
    model = load_model(checkpoint)
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_checking_reports_progress(place: Path, write_bundle: Write) -> None:
    write_bundle(place / "b")
    seen: list[tuple[int, int]] = []
    open_bundle(place / "b", progress=lambda stage, done, total, unit="": seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(p.stat().st_size for p in (place / "b").iterdir() if p.suffix != ".json")


def test_no_bundle_is_named(tmp_path: Path, place: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="no such folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleNotFoundError, match=r"no manifest\.json"):
        open_bundle(place)
    assert not is_bundle(place)


NAMES = ["manifest.json", "prefill.onnx", "decode.onnx", "tokenizer.model", "weights.safetensors"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
def test_one_flipped_byte_is_found_and_its_file_named(
    place: Path, write_bundle: Write, name: str, where: float
) -> None:
    write_bundle(place / "b")
    path = place / "b" / name
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0x41
    path.write_bytes(content)
    with pytest.raises(BundleCorruptError, match=name) as caught:
        open_bundle(place / "b")
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_of_a_manifest_is_found(place: Path, write_bundle: Write) -> None:
    whole = write_bundle(place / "b").manifest
    path = place / "b" / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            assert open_bundle(place / "b", check=False).manifest == whole
        except BundleCorruptError as error:
            assert "manifest.json" in str(error) or "missing" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", NAMES[1:])
def test_missing_and_shortened_files_are_found_without_checksums(place: Path, write_bundle: Write, name: str) -> None:
    write_bundle(place / "b")
    path = place / "b" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleCorruptError, match=rf"{name}: has \d+ bytes; expected"):
        open_bundle(place / "b", check=False)
    path.unlink()
    with pytest.raises(BundleCorruptError, match=f"{name}: missing"):
        open_bundle(place / "b", check=False)


def test_reports_are_added_and_replaced(place: Path, write_bundle: Write) -> None:
    bundle = write_bundle(place / "b")
    first = bundle.add_reports({"ok": False}, {"parity.json": b"1", "parity.html": b"2"})
    second = first.add_reports({"ok": True}, {"parity.json": b"3"})
    opened = open_bundle(place / "b")
    assert opened == second
    assert opened.manifest.parity == {"ok": True}
    assert (place / "b" / "reports" / "parity.json").read_bytes() == b"3"
    assert set(opened.manifest.files) >= {"reports/parity.json", "reports/parity.html"}
    assert not list((place / "b").rglob("*.partial*"))


def test_reports_of_a_bundle_that_was_replaced_meanwhile_are_not_put_into_the_new_one(
    place: Path, write_bundle: Write
) -> None:
    verified = write_bundle(place / "b")
    new = write_bundle(place / "b", overwrite=True, decode=b"another")
    with pytest.raises(WriteError, match="another bundle has taken this one's place"):
        verified.add_reports({}, {"parity.json": b"1"})
    assert open_bundle(place / "b") == new


def test_reports_that_are_added_at_the_same_time_fit_the_manifest(place: Path, write_bundle: Write) -> None:
    bundle = write_bundle(place / "b")

    def add(run: int) -> None:
        bundle.add_reports({"run": run}, {"parity.json": bytes([run]) * 1000, "parity.html": b"1"})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(40)))
    opened = open_bundle(place / "b")
    assert opened.manifest.parity is not None
    assert (place / "b" / "reports" / "parity.json").read_bytes()[0] == opened.manifest.parity["run"]


def test_reports_stay_inside_the_bundle(place: Path, write_bundle: Write) -> None:
    with pytest.raises(ValueError, match="no plain path"):
        write_bundle(place / "b").add_reports({}, {"../../x": b""})


@pytest.mark.parametrize("deaths", range(1, 6))
def test_a_bundle_is_whole_wherever_adding_reports_is_killed(
    place: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    bundle = write_bundle(place / "b").add_reports({"run": 1}, {"parity.json": b"1", "parity.html": b"1"})
    calls = 0
    real = Path.replace

    def dying(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == deaths:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    new = {"parity.json": b"two", "parity.html": b"two"}
    if deaths <= 4:
        with pytest.raises(KeyboardInterrupt):
            bundle.add_reports({"run": 2}, new)
    else:
        bundle.add_reports({"run": 2}, new)
    assert open_bundle(place / "b").manifest.parity == {1: {"run": 1}, 5: {"run": 2}}.get(deaths)


def test_reports_that_can_not_be_written_leave_the_bundle_whole(
    place: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(place / "b")
    (place / "b" / "reports").write_text("in the way")
    with pytest.raises(WriteError, match=str(place / "b")):
        bundle.add_reports({}, {"parity.json": b"1"})
    assert open_bundle(place / "b") == bundle


def test_unknown_files_beside_a_bundles_own_do_not_matter_to_readers(place: Path, write_bundle: Write) -> None:
    bundle = write_bundle(place / "b")
    (place / "b" / "engines").mkdir()
    (place / "b" / "engines" / "x.bin").write_bytes(b"1")
    assert open_bundle(place / "b") == bundle
    assert json.loads((place / "b" / "manifest.json").read_text())["schema_version"] == 1
