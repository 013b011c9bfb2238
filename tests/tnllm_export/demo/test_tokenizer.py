import numpy as np
import pytest

from tnllm_export.demo.corpus import Corpus
from tnllm_export.demo.tokenizer import END_OF_TEXT, Segmenter, load_tokenizer, train_tokenizer

Tokenizer = tuple[bytes, list[str]]


@pytest.fixture(scope="module")
def trained(small_corpus: Corpus) -> Tokenizer:
    training, _ = small_corpus.split()
    return train_tokenizer(training, 400), training


def test_any_text_survives_encoding(trained: Tokenizer) -> None:
    tokenizer = load_tokenizer(trained[0])
    for text in [*trained[1], "Naïve 東京 — 1816\n\n\tEnd  of it.", '"', "\n\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_stand_where_released_tokenizers_have_them(trained: Tokenizer) -> None:
    tokenizer = load_tokenizer(trained[0])
    assert (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert tokenizer.get_piece_size() <= 400
    assert len(tokenizer.encode("Emma—Emma\n\nEmma")) <= len(tokenizer.encode("Emma")) * 5


def test_the_same_text_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert train_tokenizer(trained[1], 400) == trained[0]


def test_the_best_segmentation_by_units_is_that_of_whole_chapters(trained: Tokenizer) -> None:
    tokenizer = load_tokenizer(trained[0])
    whole = [token for chapter in trained[1] for token in [*tokenizer.encode(chapter), END_OF_TEXT]]
    np.testing.assert_array_equal(Segmenter(tokenizer, trained[1]).encode(), whole)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_sampled_segmentations_spell_the_same_text_otherwise(trained: Tokenizer, alpha: float) -> None:
    tokenizer = load_tokenizer(trained[0])
    segmenter = Segmenter(tokenizer, trained[1])
    one, other = (segmenter.sample(np.random.default_rng(seed), 1.0, alpha) for seed in range(2))
    assert (
        tokenizer.decode(one.tolist())
        == tokenizer.decode(other.tolist())
        == "".join([trained[1][0], *(f" {chapter}" for chapter in trained[1][1:])])
    )
    assert one.tolist() != other.tolist()
    np.testing.assert_array_equal(one, segmenter.sample(np.random.default_rng(0), 1.0, alpha))


def test_a_rate_of_zero_samples_nothing(trained: Tokenizer) -> None:
    segmenter = Segmenter(load_tokenizer(trained[0]), trained[1])
    np.testing.assert_array_equal(segmenter.sample(np.random.default_rng(0), 0.0, 0.1), segmenter.encode())
