"""The checkpoint that the package ships is what its card says, and writes words rather than noise."""

import gzip
import json
import math
import random
import re
from collections.abc import Hashable, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tnllm_export.demo import checkpoint_folder
from tnllm_export.demo.card import card_text
from tnllm_export.demo.evaluate import continue_text, evaluate
from tnllm_export.demo.tokenizer import load_tokenizer
from tnllm_export.models.checkpoint import load_model, open_checkpoint
from tnllm_export.models.modeling import TransnormerForCausalLM

DATA = Path(__file__).parent / "data"
FOLDER = checkpoint_folder()


@pytest.fixture(scope="module")
def model() -> TransnormerForCausalLM:
    return load_model(open_checkpoint(FOLDER))


@pytest.fixture(scope="module")
def novels_words() -> set[str]:
    """Every word of the six novels, in lower case."""
    return set(gzip.decompress((DATA / "words.txt.gz").read_bytes()).decode("utf-8").split())


@pytest.fixture(scope="module")
def common_pairs() -> set[tuple[str, str]]:
    """The 3,000 most frequent pairs of neighbouring words in the chapters that it was trained on, in lower case."""
    lines = gzip.decompress((DATA / "word_pairs.txt.gz").read_bytes()).decode("utf-8").splitlines()
    return {(first, second) for first, second in map(str.split, lines)}


def test_it_is_small_and_of_the_released_form() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000
    config = open_checkpoint(FOLDER).config
    heads = config.decoder_attention_heads
    assert heads & (heads - 1), "the head count is a power of two"
    assert config.linear_use_lrpe_list == (True,) + (False,) * (config.decoder_layers - 1)
    assert (config.norm_type, config.linear_act_fun, config.glu_act_fun) == ("simplermsnorm", "silu", "none")
    assert config.linear_use_gate
    assert config.tie_word_embeddings


def test_its_card_names_source_licence_command_and_perplexity() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    record = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert card == card_text(record), "the card was edited by hand"
    assert "r-cran-janeaustenr" in card
    assert "public domain" in card
    assert "Apache-2.0" in card
    assert "tnllm train-demo --corpus /usr/lib/R/site-library/janeaustenr -o FOLDER`" in card
    assert f"**{record['validation']['perplexity']:.2f}** per token" in card
    assert "(loss.png)" in card
    assert (FOLDER / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_it_predicts_a_chapter_that_it_never_saw_about_as_well_as_its_card_says(model: TransnormerForCausalLM) -> None:
    tokenizer = load_tokenizer((FOLDER / "tokenizer.model").read_bytes())
    chapter = (DATA / "held_out_chapter.txt").read_text(encoding="utf-8")
    record = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    measured = evaluate(model, tokenizer, [chapter])
    # One chapter of thirteen: some are harder than others, but none by more than a quarter.
    assert measured.bits_per_character == pytest.approx(record["validation"]["bits_per_character"], rel=0.25)
    assert measured.tokens > 500


def test_what_it_writes_is_words_in_an_order_that_english_has(
    model: TransnormerForCausalLM, novels_words: set[str], common_pairs: set[tuple[str, str]]
) -> None:
    tokenizer = load_tokenizer((FOLDER / "tokenizer.model").read_bytes())
    texts = [
        continue_text(model, tokenizer, prompt, tokens=100, seed=seed).removeprefix(prompt)
        for seed, prompt in enumerate(["The next morning", '"My dear', "It was not to be supposed that", "Sir Thomas"])
    ]
    words = _words(" ".join(texts))
    assert len(words) > 200
    assert _share(words, novels_words) >= 0.98
    # Words, not one word over and over.
    assert len(set(words)) > 0.3 * len(words)
    # Jane Austen's own share is lower: she is less fond of the common turns.
    chapter = _words((DATA / "held_out_chapter.txt").read_text(encoding="utf-8"))
    assert _share(_pairs(words), common_pairs) >= _share(_pairs(chapter), common_pairs)
    # The measures have teeth: the same words in random order, and pieces in random order.
    shuffled = random.Random(0).sample(words, len(words))
    assert _share(_pairs(shuffled), common_pairs) < 0.5 * _share(_pairs(words), common_pairs)
    noise = _words(
        tokenizer.decode(torch.randint(262, tokenizer.get_piece_size(), (400,), generator=_seeded()).tolist())
    )
    assert _share(noise, novels_words) < 0.95
    assert _share(_pairs(noise), common_pairs) < 0.05


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


def _share(found: Sequence[Hashable], known: Set[Any]) -> float:
    assert found
    return math.fsum(item in known for item in found) / len(found)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
