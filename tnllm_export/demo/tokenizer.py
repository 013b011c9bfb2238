"""The demo model's SentencePiece tokenizer, and segmentations of the training text sampled from it."""

import io
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import sentencepiece

from tnllm_export.demo.corpus import PARAGRAPH_BREAK

END_OF_TEXT = 2
"""Id of the end token; pad, bos and unk are 0, 1 and 3."""

TokenIds = npt.NDArray[np.int32]

# Pieces never cross the border of a unit, so the best segmentation of a text is that of its units, one by one.
_UNIT = re.compile(r"\n\n| ?[^\s—]+| ?—+|\s")


def train_tokenizer(chapters: Sequence[str], vocab_size: int) -> bytes:
    """Train a unigram model with byte fallback; the same chapters always give the same model.

    Paragraph breaks are one piece. A text too short for `vocab_size` pieces gives fewer.

    Returns:
        The content of `tokenizer.model`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for chapter in chapters for line in chapter.split(PARAGRAPH_BREAK)]),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=END_OF_TEXT,
        unk_id=3,
        user_defined_symbols=[PARAGRAPH_BREAK, "—"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def load_tokenizer(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Open the content of `tokenizer.model`."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


class Segmenter:
    """Turns chapters into one stream of tokens, each chapter closed by the end token.

    Subword regularisation (Kudo, arXiv 1804.10959): `sample` splits a share of the words otherwise than `encode`
    would, with probabilities p^alpha, so that no two epochs are the same tokens. A unit (a word with the punctuation
    that touches it) is drawn among its `candidates` best segmentations.
    """

    def __init__(
        self, tokenizer: sentencepiece.SentencePieceProcessor, chapters: Sequence[str], candidates: int = 24
    ) -> None:
        index: dict[str, int] = {}
        units: list[int] = []
        for chapter in chapters:
            # SentencePiece puts a space before every text; the end token is no text.
            for unit in [*_UNIT.findall(f" {chapter}"), ""]:
                units.append(index.setdefault(unit, len(index)))
        segmentations: list[list[int]] = []
        scores = np.full((len(index), candidates), -np.inf)
        for row, unit in enumerate(index):
            found = _segment(tokenizer, unit, candidates)
            scores[row, : len(found)] = [score for _, score in found]
            segmentations += [ids for ids, _ in found] + [[]] * (candidates - len(found))
        self._units = np.array(units)
        self._scores = scores - scores.max(axis=1, keepdims=True)
        self._lengths = np.array([len(ids) for ids in segmentations])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._ids: TokenIds = np.array([token for ids in segmentations for token in ids], dtype=np.int32)

    def encode(self) -> TokenIds:
        """Return the most probable segmentation of the chapters, [N]: what `tokenizer.encode` gives for each."""
        return self._gather(self._units * self._scores.shape[1])

    def sample(self, generator: np.random.Generator, rate: float, alpha: float) -> TokenIds:
        """Return the chapters [N] with a share `rate` of their units drawn anew, with probabilities p^alpha."""
        weights = np.exp(alpha * self._scores)
        cumulative = np.cumsum(weights, axis=1)
        cumulative /= cumulative[:, -1:]
        choice = np.zeros(len(self._units), dtype=np.int64)
        drawn = np.flatnonzero(generator.random(len(choice)) < rate)
        # [n, candidates] compared with [n, 1]
        choice[drawn] = (cumulative[self._units[drawn]] < generator.random((len(drawn), 1))).sum(axis=1)
        return self._gather(self._units * self._scores.shape[1] + choice)

    def _gather(self, rows: npt.NDArray[np.int64]) -> TokenIds:
        """Concatenate segmentations given by their numbers."""
        lengths = self._lengths[rows]
        ends = np.cumsum(lengths)
        offsets = np.repeat(self._starts[rows] - (ends - lengths), lengths)
        tokens: TokenIds = self._ids[offsets + np.arange(ends[-1])]
        return tokens


def _segment(
    tokenizer: sentencepiece.SentencePieceProcessor, unit: str, candidates: int
) -> list[tuple[list[int], float]]:
    """Return the best segmentations of a unit and their log probabilities, best first."""
    if not unit:
        return [([END_OF_TEXT], 0.0)]
    if unit == PARAGRAPH_BREAK:
        return [([tokenizer.piece_to_id(PARAGRAPH_BREAK)], 0.0)]
    if unit.startswith(" "):
        # The space that SentencePiece puts before a text stands for this one.
        text, skipped = unit[1:], 0
    else:
        text, skipped = PARAGRAPH_BREAK + unit, 2
    # The best one is what `encode` picks, whatever order equals have here.
    best = tokenizer.encode(text)
    segmentations = {tuple(best)} | {
        tuple(ids)
        for ids in tokenizer.nbest_encode(text, nbest_size=candidates - 1)
        if ids[:skipped] == best[:skipped] and not any(map(tokenizer.is_byte, ids))
    }
    best = best[skipped:]
    # The unigram model: a segmentation's probability is the product of its pieces'.
    scored = [(list(ids[skipped:]), sum(map(tokenizer.get_score, ids[skipped:]))) for ids in segmentations]
    return sorted(scored, key=lambda found: (found[0] != best, -found[1], found[0]))
