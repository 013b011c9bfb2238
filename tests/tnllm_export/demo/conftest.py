"""A small text to train on, made of sentences that a small grammar gives."""

import random

import pytest

from tnllm_export.demo.corpus import PARAGRAPH_BREAK, Corpus, Novel


def _chapter(seed: int) -> str:
    draw = random.Random(seed)
    people = ["Emma", "Miss Bates", "Mr. Weston", "Anne", "the Admiral"]
    deeds = ["walked to the village", "wrote a long letter", "could not speak", "was perfectly happy", "dined alone"]
    times = ["that morning", "on Thursday", "before the ball", "after all", "with great pleasure"]

    def sentence() -> str:
        return f"{draw.choice(people)} {draw.choice(deeds)} {draw.choice(times)}—and {draw.choice(deeds)}."

    def paragraph() -> str:
        return f'"{sentence()}" {sentence()} {sentence()}'

    return PARAGRAPH_BREAK.join(paragraph() for _ in range(12))


@pytest.fixture(scope="session")
def small_corpus() -> Corpus:
    """Two novels of three chapters, about 2,000 characters each."""
    novels = tuple(Novel(f"Novel {n}", tuple(_chapter(10 * n + c) for c in range(3))) for n in range(2))
    return Corpus("sentences made up for a test", "none needed", "small.json", novels)
