import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tnllm_export.demo import TrainingResult, TrainingSettings, train
from tnllm_export.demo.corpus import Corpus
from tnllm_export.demo.evaluate import evaluate
from tnllm_export.demo.tokenizer import load_tokenizer
from tnllm_export.errors import RequestError, UnsupportedTargetError, WriteError
from tnllm_export.models.checkpoint import load_model, open_checkpoint

SMALL = TrainingSettings(
    vocab_size=330,
    width=48,
    heads=3,
    layers=2,
    glu_width=64,
    steps=3,
    batch_size=2,
    sequence_length=40,
    warmup_steps=1,
    validate_every=2,
)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory, small_corpus: Corpus) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.json"
    small_corpus.save(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> TrainingResult:
    return train(corpus_file, tmp_path_factory.mktemp("trained") / "demo", settings=SMALL, device="cpu")


def test_the_folder_is_a_checkpoint_in_the_released_form(trained: TrainingResult) -> None:
    checkpoint = open_checkpoint(trained.folder)
    config = json.loads((trained.folder / "config.json").read_text(encoding="utf-8"))
    assert config["linear_use_lrpe_list"] == [1, 0]
    assert (config["model_type"], config["norm_type"], config["torch_dtype"]) == (
        "transnormer",
        "simplermsnorm",
        "bfloat16",
    )
    assert checkpoint.read("model.embed_tokens.weight").dtype == torch.bfloat16
    assert checkpoint.read("model.layers.0.token_mixer.lrpe.theta").dtype == torch.float32
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "README.md",
        "config.json",
        "loss.png",
        "model.safetensors",
        "tokenizer.model",
        "training.json",
    ]


def test_the_card_tells_what_was_measured_on_the_stored_weights(trained: TrainingResult, small_corpus: Corpus) -> None:
    tokenizer = load_tokenizer((trained.folder / "tokenizer.model").read_bytes())
    _, validation = small_corpus.split()
    measured = evaluate(load_model(open_checkpoint(trained.folder)), tokenizer, validation)
    assert measured.perplexity == pytest.approx(trained.validation.perplexity, rel=1e-5)
    card = (trained.folder / "README.md").read_text(encoding="utf-8")
    assert f"**{measured.perplexity:.2f}** per token" in card
    assert f"{measured.bits_per_character:.3f} bits per character" in card
    assert small_corpus.source in card
    assert small_corpus.licence in card
    assert "width=48" in card
    assert card.count("\n> **") >= 4


def test_the_three_units_of_the_loss_agree(trained: TrainingResult, small_corpus: Corpus) -> None:
    _, validation = small_corpus.split()
    measured = trained.validation
    nats = measured.tokens * math.log(measured.perplexity)
    words = sum(len(chapter.split()) for chapter in validation)
    assert nats == pytest.approx(words * math.log(measured.word_perplexity))
    assert nats == pytest.approx(sum(map(len, validation)) * measured.bits_per_character * math.log(2))


def test_the_curve_has_every_validation_and_the_best_is_kept(trained: TrainingResult) -> None:
    assert [point.step for point in trained.curve] == [2, 3]
    best = min(trained.curve, key=lambda point: point.validation_loss)
    assert trained.best_step == best.step
    # Stored in bfloat16, the kept weights have nearly the loss that they had.
    assert math.log(trained.validation.perplexity) == pytest.approx(best.validation_loss, abs=2e-3)
    assert (trained.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    trained: TrainingResult, corpus_file: Path, tmp_path: Path
) -> None:
    train(corpus_file, tmp_path / "again", settings=SMALL, device="cpu")
    train(corpus_file, tmp_path / "other", settings=dataclasses.replace(SMALL, seed=1), device="cpu")
    first, again, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (trained.folder, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first != other


def test_training_lowers_the_loss(corpus_file: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, steps=60, validate_every=20, dropout=0.0)
    seen: list[tuple[str, int, int]] = []
    result = train(
        corpus_file,
        tmp_path / "demo",
        settings=settings,
        device="cpu",
        progress=lambda stage, done, total, unit="": seen.append((stage, done, total)),
    )
    assert result.curve[-1].validation_loss < 0.9 * result.curve[0].validation_loss
    for stage in ["reading the corpus", "training the tokenizer", "training", "writing the checkpoint"]:
        _, done, total = [entry for entry in seen if entry[0] == stage][-1]
        assert done == total


def test_a_time_limit_ends_training_early(corpus_file: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, steps=1_000_000, validate_every=1_000_000, time_limit_s=0.2)
    result = train(corpus_file, tmp_path / "demo", settings=settings, device="cpu")
    assert 1 <= result.curve[-1].step < 1000


def test_an_existing_folder_is_never_touched(corpus_file: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(WriteError, match="exists; choose another folder"):
        train(corpus_file, tmp_path / "demo", settings=SMALL, device="cpu")
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_failed_training_leaves_nothing_behind(corpus_file: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, learning_rate=math.inf)
    with pytest.raises(RequestError, match="training diverged before step 2"):
        train(corpus_file, tmp_path / "demo", settings=settings, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_named(corpus_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTargetError, match="device is 'abacus'; expected cpu"):
        train(corpus_file, tmp_path / "demo", settings=SMALL, device="abacus")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kernels", ["abacus", "triton"])
def test_kernels_that_can_not_run_are_told_before_training(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TNLLM_KERNELS", kernels)
    with pytest.raises(UnsupportedTargetError, match="TNLLM_KERNELS"):
        train(corpus_file, tmp_path / "demo", settings=SMALL, device="cpu")
    assert list(tmp_path.iterdir()) == []
