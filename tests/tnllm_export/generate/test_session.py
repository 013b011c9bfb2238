"""State files: whole or not there, and refused with a reason where they do not fit."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tnllm_export.errors import StateError, WriteError
from tnllm_export.generate import Generator, SamplingParams, Session, load_state, save_state
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import TorchRuntime


@pytest.fixture
def session(torch_runtime: TorchRuntime) -> Session:
    (found,) = Generator(torch_runtime).generate([5, 6], SamplingParams(max_new_tokens=2), keep_sessions=True)
    assert found.session is not None
    return found.session


@pytest.fixture
def path(tmp_path: Path, session: Session, torch_runtime: TorchRuntime) -> Path:
    save_state(tmp_path / "state", session, torch_runtime)
    return tmp_path / "state"


def rewrite(path: Path, metadata: dict[str, str] | None = None, drop: str = "", **tensors: torch.Tensor) -> None:
    with safe_open(path, "pt") as file:
        old = dict(file.metadata())
    kept = {name: tensor.clone() for name, tensor in load_file(path).items() if name != drop}
    save_file({**kept, **tensors}, path, {**old, **(metadata or {})})


def refusal(path: Path, runtime: TorchRuntime) -> str:
    with pytest.raises(StateError) as caught:
        load_state(path, runtime)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def other_model(**fields: object) -> TorchRuntime:
    base: dict[str, object] = {
        "vocab_size": 97,
        "decoder_embed_dim": 48,
        "decoder_layers": 2,
        "decoder_attention_heads": 3,
        "glu_dim": 80,
        "init_std": 0.2,
    }
    return TorchRuntime(TransnormerForCausalLM(TransnormerConfig.model_validate({**base, **fields})))


def test_a_session_comes_back_as_it_was(path: Path, session: Session, torch_runtime: TorchRuntime) -> None:
    found = load_state(path, torch_runtime)
    assert (found.token_ids, found.position, found.seed) == (session.token_ids, session.position, session.seed)
    assert found.logits is None
    assert found.rng.equal(session.rng)
    assert all(one.equal(other) for one, other in zip(found.state, session.state, strict=True))


def test_the_file_is_plain_safetensors_with_the_state_of_each_layer(path: Path) -> None:
    assert {"state.0", "state.1", "token_ids", "rng"} == load_file(path).keys()
    assert load_file(path)["state.0"].shape == (1, 3, 32, 16)


def test_saving_again_replaces_the_file_and_leaves_nothing_else(
    path: Path, session: Session, torch_runtime: TorchRuntime
) -> None:
    save_state(path, session, torch_runtime)
    assert os.listdir(path.parent) == ["state"]


def test_nothing_but_a_saved_state_is_replaced(tmp_path: Path, session: Session, torch_runtime: TorchRuntime) -> None:
    other = tmp_path / "other"
    for write in (
        lambda: other.write_bytes(b"mine"),
        lambda: save_file({"x": torch.zeros(1)}, other),
        lambda: save_file({"x": torch.zeros(1)}, other, {"format": "pt"}),
    ):
        write()
        before = other.read_bytes()
        with pytest.raises(WriteError, match="exists already and is not a saved state"):
            save_state(other, session, torch_runtime)
        assert other.read_bytes() == before


def test_a_failed_save_leaves_the_old_file(
    path: Path, session: Session, torch_runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as caught:
        save_state(path, session, torch_runtime)
    assert "disk is full" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state"]


def test_a_path_through_a_file_is_refused(path: Path, session: Session, torch_runtime: TorchRuntime) -> None:
    with pytest.raises(WriteError) as caught:
        save_state(path / "state", session, torch_runtime)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"decoder_layers": 3}, "state of another model: decoder_layers is 2; expected 3"),
        ({"decoder_embed_dim": 96}, "decoder_embed_dim is 48; expected 96"),
        ({"decay_type": "paper"}, "decay_type is release; expected paper"),
    ],
)
def test_the_state_of_another_model_is_refused(path: Path, fields: dict[str, object], found: str) -> None:
    assert found in refusal(path, other_model(**fields))


def test_the_state_of_another_dtype_is_refused(path: Path, model: TransnormerForCausalLM) -> None:
    half = TransnormerForCausalLM(model.config).cast_weights(torch.float16)
    assert "state of a float32 model; expected float16" in refusal(path, TorchRuntime(half))


def test_the_state_of_other_weights_is_refused(path: Path, model: TransnormerForCausalLM) -> None:
    runtime = TorchRuntime(model, weights_id="ab" * 32)
    assert "state of other weights (none on disk); expected abababababab" in refusal(path, runtime)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, torch_runtime: TorchRuntime) -> None:
    assert "no such file" in refusal(tmp_path / "nothing", torch_runtime)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(path: Path, torch_runtime: TorchRuntime, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    assert "not a readable state file" in refusal(path, torch_runtime)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda path: save_file({"x": torch.zeros(1)}, path), "no saved state"),
        (lambda path: rewrite(path, {"schema_version": "2"}), "schema version is 2; expected 1"),
        (lambda path: rewrite(path, {"position": "9"}), "position is 9; expected 3"),
        (lambda path: rewrite(path, {"config": "{"}), "incomplete state file"),
        (lambda path: rewrite(path, {"config": "[]"}), "incomplete state file"),
        (lambda path: rewrite(path, token_ids=torch.tensor(3)), "incomplete state file"),
        (lambda path: rewrite(path, drop="state.1"), "incomplete state file (KeyError('state.1'))"),
        (lambda path: rewrite(path, drop="rng"), "incomplete state file"),
        (lambda path: rewrite(path, **{"state.1": torch.zeros(1, 3, 16, 8)}), "layer 1 has shape [1, 3, 16, 8]"),
        (lambda path: rewrite(path, **{"state.1": torch.zeros(1, 3, 16, 16).half()}), "layer 1 is float16"),
        (
            lambda path: rewrite(path, **{"state.0": torch.zeros(2, 3, 32, 16), "state.1": torch.zeros(2, 3, 16, 16)}),
            "holds 2 sequences; expected 1",
        ),
        (lambda path: rewrite(path, logits=torch.zeros(5)), "logits have shape [5]; expected [97]"),
        (lambda path: rewrite(path, rng=torch.zeros(5, dtype=torch.uint8)), "rng is no state of a random generator"),
        (lambda path: rewrite(path, token_ids=torch.tensor([1, 2, 3, 97])), "token id outside the vocabulary"),
    ],
)
def test_a_file_that_does_not_hold_together_is_refused(
    path: Path, torch_runtime: TorchRuntime, spoil: Callable[[Path], None], found: str
) -> None:
    spoil(path)
    assert found in refusal(path, torch_runtime)
