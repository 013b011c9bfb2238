"""Batching, cutting and interrupting change no token, greedy or sampled, on either runtime."""

import math
from pathlib import Path

import pytest

from tnllm_export.generate import Generation, Generator, SamplingParams, load_state, save_state
from tnllm_export.models.tokenizer import Tokenizer
from tnllm_export.runtime import Runtime

GREEDY = SamplingParams(max_new_tokens=12, stop_at_eos=False)
SAMPLED = SamplingParams(
    max_new_tokens=12, temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=7, stop_at_eos=False
)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13] * 15]

both = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def tokens(found: list[Generation]) -> list[tuple[int, ...]]:
    return [generation.token_ids for generation in found]


@both
def test_each_prompt_of_a_batch_goes_on_as_alone(runtime: Runtime, params: SamplingParams) -> None:
    generator = Generator(runtime)
    together = tokens(generator.generate(PROMPTS, params))
    assert together == [tokens(generator.generate(prompt, params))[0] for prompt in PROMPTS]
    assert together[::-1] == tokens(generator.generate(PROMPTS[::-1], params))
    assert len(set(together)) == 3


@both
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_size_of_pieces_changes_no_token(runtime: Runtime, params: SamplingParams, chunk: int) -> None:
    whole = tokens(Generator(runtime).generate(PROMPTS, params))
    assert tokens(Generator(runtime, prefill_chunk=chunk).generate(PROMPTS, params)) == whole


def test_a_seed_reproduces_and_another_differs(runtime: Runtime) -> None:
    generator = Generator(runtime)
    params = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed, stop_at_eos=False) for seed in (1, 2, 1)]
    one, other, again = tokens(generator.generate([[5, 6]] * 3, params))
    assert one == again
    assert one != other


def test_a_repetition_penalty_avoids_what_was_said(runtime: Runtime) -> None:
    params = SamplingParams(max_new_tokens=40, repetition_penalty=1e6, stop_at_eos=False)
    (found,) = Generator(runtime).generate([5, 6, 7], params)
    everything = (*found.prompt_ids, *found.token_ids)
    assert len(set(everything)) == len(everything)


@both
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_saved_and_restored_sequence_goes_on_as_uninterrupted(
    runtime: Runtime, params: SamplingParams, taken: int, tmp_path: Path
) -> None:
    generator = Generator(runtime, prefill_chunk=64)
    for prompt in PROMPTS:
        (whole,) = generator.generate(prompt, params, keep_sessions=True)
        (first,) = generator.generate(prompt, _limit(params, taken), keep_sessions=True)
        assert first.session is not None
        save_state(tmp_path / "state", first.session, runtime)
        restored = load_state(tmp_path / "state", runtime)
        (rest,) = generator.generate([[]], _limit(params, 12 - taken), sessions=[restored], keep_sessions=True)
        assert (*first.token_ids, *rest.token_ids) == whole.token_ids
        assert whole.session is not None
        assert rest.session is not None
        assert rest.session.token_ids == whole.session.token_ids == (*prompt, *whole.token_ids)
        assert rest.session.position == len(prompt) + 11
        for one, other in zip(rest.session.state, whole.session.state, strict=True):
            assert one.equal(other)
        assert rest.session.rng.equal(whole.session.rng)


def test_sessions_of_a_batch_that_ends_row_by_row_go_on_as_uninterrupted(runtime: Runtime) -> None:
    generator = Generator(runtime)
    taken = (2, 5, 0)
    first = generator.generate(PROMPTS, [_limit(GREEDY, count) for count in taken], keep_sessions=True)
    sessions = [generation.session for generation in first]
    rest = generator.generate([[], [], []], [_limit(GREEDY, 12 - count) for count in taken], sessions=sessions)
    joined = [(*one.token_ids, *other.token_ids) for one, other in zip(first, rest, strict=True)]
    assert joined == tokens(generator.generate(PROMPTS, GREEDY))


def test_a_session_can_be_continued_by_more_prompt_beside_a_new_prompt(runtime: Runtime) -> None:
    generator = Generator(runtime)
    (first,) = generator.generate([5, 6, 7], _limit(GREEDY, 3), keep_sessions=True)
    more = [40, 41]
    found = generator.generate([more, [9, 10]], GREEDY, sessions=[first.session, None])
    assert found[0].prompt_ids == (40, 41)
    expected = generator.generate([[5, 6, 7, *first.token_ids, *more], [9, 10]], GREEDY)
    assert tokens(found) == tokens(expected)


def test_one_session_branches_by_seed(runtime: Runtime) -> None:
    generator = Generator(runtime)
    (read,) = generator.generate([5, 6, 7], _limit(SAMPLED, 0), keep_sessions=True)
    params = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed) for seed in (7, 8)]
    found = tokens(generator.generate([[], []], params, sessions=[read.session] * 2))
    assert found == tokens(generator.generate([[5, 6, 7]] * 2, params))
    assert found[0] != found[1]


def test_the_texts_of_a_stream_are_the_text_of_generate(runtime: Runtime) -> None:
    tokenizer = Tokenizer(
        Path("letters"),
        97,
        frozenset({0, 1, 2}),
        lambda text: [ord(letter) - 29 for letter in text],
        lambda ids: "".join(chr(token + 29) for token in ids),
    )
    generator = Generator(runtime, tokenizer)
    params = SamplingParams(max_new_tokens=30, temperature=1.0, stop=("a", "e", "??"))
    streamed = ["", "", ""]
    for event in generator.stream(["one", "two words", "x"], params):
        streamed[event.index] += event.text
    assert streamed == [found.text for found in generator.generate(["one", "two words", "x"], params)]
    assert any(streamed)


def test_times_are_told(
    runtime: Runtime,
) -> None:
    generator = Generator(runtime)
    (found,) = generator.generate([5, 6, 7], GREEDY)
    assert found.prefill_seconds > 0
    assert found.decode_seconds > 0
    assert math.isclose(found.tokens_per_second, 11 / found.decode_seconds)


def _limit(params: SamplingParams, tokens: int) -> SamplingParams:
    return SamplingParams(**{**vars(params), "max_new_tokens": tokens})
