"""A generator that runs ahead gives the tokens, texts, ends and sessions of one that does not."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tnllm_export.runtime.fake_graphs import captured_on_the_cpu
from tnllm_export.errors import RuntimeTargetError
from tnllm_export.generate import Generation, Generator, SamplingParams, Session
from tnllm_export.generate.choices import Chooser
from tnllm_export.generate.sampling import choose
from tnllm_export.generate.sequence import RunningSequence
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.models.tokenizer import Tokenizer
from tnllm_export.runtime import TorchRuntime
from tnllm_export.runtime.cuda_graphs import Captured

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13] * 15]
LETTERS = Tokenizer(
    Path("letters"),
    97,
    frozenset({0, 1, 2}),
    lambda text: [ord(letter) - 29 for letter in text],
    lambda ids: "".join(chr(token + 29) for token in ids),
)
GREEDY = SamplingParams(max_new_tokens=20, stop_at_eos=False)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=7)
PENALISED = replace(GREEDY, repetition_penalty=1.5)

every = pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])


class Steps:
    """Counts the steps that were started."""

    def __init__(self) -> None:
        self.started = 0

    def __call__(self, call: Callable[[], Tensor]) -> Captured:
        captured = captured_on_the_cpu(call)

        def replay() -> None:
            self.started += 1
            captured.replay()

        return Captured(replay, captured.logits)


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def ahead(model: TransnormerForCausalLM, steps: Steps) -> Generator:
    return Generator(TorchRuntime(model, capture=steps), LETTERS)


@pytest.fixture
def in_turns(model: TransnormerForCausalLM) -> Generator:
    return Generator(TorchRuntime(model), LETTERS)


def made(found: list[Generation]) -> list[tuple[object, ...]]:
    return [(one.token_ids, one.text, one.finish_reason) for one in found]


def fresh(generation: Generation, start: int) -> int:
    """A place to stop at, near `start`: its token has a letter and did not come earlier."""
    ids = generation.token_ids
    places = [place for place, token in enumerate(ids) if token > 2 and token not in ids[:place]]
    return next((place for place in places if place >= start), places[-1])


def letter(generation: Generation, place: int) -> str:
    return chr(generation.token_ids[place] + 29)


def told(generator: Generator, prompt: list[int], params: SamplingParams) -> Session:
    (part,) = generator.generate(prompt, params, keep_sessions=True)
    assert part.session is not None
    return part.session


@every
def test_batches_that_end_row_by_row_are_the_same(
    ahead: Generator, in_turns: Generator, params: SamplingParams
) -> None:
    free = in_turns.generate(PROMPTS, params)
    rows = [replace(params, max_new_tokens=9), replace(params, stop=(letter(free[1], fresh(free[1], 3)),)), params]
    expected = in_turns.generate(PROMPTS, rows)
    assert [one.finish_reason for one in expected] == ["length", "stop", "length"]
    assert made(ahead.generate(PROMPTS, rows)) == made(expected)


@pytest.mark.parametrize("mixed", [(GREEDY, SAMPLED, PENALISED), (SAMPLED, replace(SAMPLED, seed=8), GREEDY)])
def test_rows_of_different_parameters_are_the_same(
    ahead: Generator, in_turns: Generator, mixed: tuple[SamplingParams, ...]
) -> None:
    assert made(ahead.generate(PROMPTS, mixed)) == made(in_turns.generate(PROMPTS, mixed))


def test_the_next_step_is_under_way_when_a_token_is_told(ahead: Generator, steps: Steps) -> None:
    started = [steps.started for _ in ahead.stream([5, 6], replace(GREEDY, max_new_tokens=6))]
    # The first token comes from the prompt, and the last one is not fed.
    assert started == [0, 2, 3, 4, 5, 5]


def test_at_a_stop_only_one_step_was_in_vain(ahead: Generator, in_turns: Generator, steps: Steps) -> None:
    (free,) = in_turns.generate([5, 6, 7], GREEDY)
    place = fresh(free, 3)
    ahead.generate([5, 6, 7], replace(GREEDY, stop=(letter(free, place),)))
    assert steps.started == place + 1


@every
@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_session_that_ended_by_a_stop_goes_on_as_uninterrupted(
    ahead: Generator, in_turns: Generator, params: SamplingParams, start: int
) -> None:
    for prompt in PROMPTS:
        (whole,) = in_turns.generate(prompt, params)
        place = fresh(whole, start)
        stopped = replace(params, stop=(letter(whole, place),))
        (part,) = ahead.generate(prompt, stopped, keep_sessions=True)
        session = part.session
        assert session is not None
        assert part.finish_reason == "stop"
        count = place + 1
        assert part.token_ids == whole.token_ids[:count]
        assert session.token_ids == (*prompt, *whole.token_ids[:count])
        assert session.position == len(session.token_ids) - (session.logits is None)
        for generator in (ahead, in_turns):
            (rest,) = generator.generate([[]], replace(params, max_new_tokens=20 - count), sessions=[session])
            assert (*part.token_ids, *rest.token_ids) == whole.token_ids
            (more,) = generator.generate([[40, 41]], params, sessions=[session])
            (other,) = in_turns.generate([[40, 41]], params, sessions=[told(in_turns, prompt, stopped)])
            assert more.token_ids == other.token_ids


@every
def test_sessions_of_a_batch_in_which_one_stops_go_on_as_uninterrupted(
    ahead: Generator, in_turns: Generator, params: SamplingParams
) -> None:
    whole = in_turns.generate(PROMPTS, params)
    place = fresh(whole[1], 3)
    rows = [params, replace(params, stop=(letter(whole[1], place),)), replace(params, max_new_tokens=8)]
    parts = ahead.generate(PROMPTS, rows, keep_sessions=True)
    left = [20 - len(part.token_ids) for part in parts]
    assert left == [0, 19 - place, 12]
    rest = ahead.generate(
        [[], []],
        [replace(params, max_new_tokens=count) for count in left[1:]],
        sessions=[part.session for part in parts[1:]],
    )
    assert [(*part.token_ids, *more.token_ids) for part, more in zip(parts[1:], rest, strict=True)] == [
        one.token_ids for one in whole[1:]
    ]


def test_a_session_that_ended_by_the_end_token_goes_on_as_uninterrupted(model: TransnormerForCausalLM) -> None:
    (whole,) = Generator(TorchRuntime(model)).generate([8], GREEDY)
    place = fresh(whole, 1)
    other = TransnormerForCausalLM(model.config.model_copy(update={"eos_token_id": whole.token_ids[place]}))
    other.load_state_dict(model.state_dict())
    generator = Generator(TorchRuntime(other, capture=captured_on_the_cpu))
    (part,) = generator.generate([8], replace(GREEDY, stop_at_eos=True), keep_sessions=True)
    assert (part.finish_reason, part.token_ids) == ("eos", whole.token_ids[: place + 1])
    assert part.session is not None
    assert part.session.logits is not None
    (rest,) = generator.generate([[]], replace(GREEDY, max_new_tokens=19 - place), sessions=[part.session])
    assert (*part.token_ids, *rest.token_ids) == whole.token_ids


def test_two_streams_of_one_runtime_read_in_turns_keep_apart(ahead: Generator, in_turns: Generator) -> None:
    both = [ahead.stream(prompt, GREEDY, keep_sessions=True) for prompt in PROMPTS[:2]]
    events = [event for pair in zip(*both, strict=True) for event in pair]
    expected = [in_turns.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS[:2]]
    assert [tuple(event.token_id for event in events[row::2]) for row in (0, 1)] == expected


@every
def test_a_stream_that_its_reader_leaves_harms_no_later_one(
    ahead: Generator, in_turns: Generator, steps: Steps, params: SamplingParams
) -> None:
    left = ahead.stream(PROMPTS, params, keep_sessions=True)
    for _ in range(3 * 4):
        next(left)
    assert steps.started == 4
    del left
    assert made(ahead.generate(PROMPTS, params)) == made(in_turns.generate(PROMPTS, params))


def test_logits_that_are_not_finite_end_generation_with_an_error(
    model: TransnormerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = TorchRuntime(model, capture=captured_on_the_cpu)
    honest = model.decode_in_place

    def decode(input_ids: Tensor, positions: Tensor, states: list[Tensor]) -> Tensor:
        logits = honest(input_ids, positions, states)
        logits[1] = torch.where(positions[1] >= 9, torch.nan, logits[1])
        return logits

    monkeypatch.setattr(model, "decode_in_place", decode)
    for params in (GREEDY, SAMPLED):
        told = []
        with pytest.raises(RuntimeTargetError) as caught:
            told.extend(Generator(runtime).stream([[5] * 6, [6] * 6], params))
        assert "logits of prompt 1 after 10 tokens are not finite: float32 overflows on torch" in str(caught.value)
        assert len(told) == 2 * 4


def test_rows_that_end_take_no_way_over_the_host(ahead: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a state of the whole batch")

    rows = [replace(GREEDY, max_new_tokens=count) for count in (3, 9, 20)]
    expected = made(ahead.generate(PROMPTS, rows))
    monkeypatch.setattr(ahead.runtime, "host_state", refuse)
    monkeypatch.setattr(ahead.runtime, "device_state", refuse)
    assert made(ahead.generate(PROMPTS, rows)) == expected


def test_a_readers_time_counts_while_a_step_is_under_way(ahead: Generator, in_turns: Generator) -> None:
    for generator, counted in ((ahead, True), (in_turns, False)):
        events = []
        for event in generator.stream([5, 6], replace(GREEDY, max_new_tokens=5)):
            events.append(event)
            time.sleep(0.05)
        whole = events[-1].generation
        assert whole is not None
        assert (whole.decode_seconds > 3 * 0.05) == counted


def test_tokens_chosen_together_are_those_chosen_alone() -> None:
    params = [GREEDY, SAMPLED, replace(SAMPLED, seed=3), PENALISED, replace(SAMPLED, top_k=0, repetition_penalty=1.0)]
    rows = [RunningSequence(place, [1, 2], one, 97, None, None) for place, one in enumerate(params)]
    rngs = [torch.Generator().manual_seed(one.seed) for one in params]
    seen = [torch.zeros(1, 97, dtype=torch.bool) for _ in params]
    for mask in seen:
        mask[0, [1, 2]] = True
    chooser = Chooser(rows, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = 3 * torch.randn(len(params), 97, generator=generator)
        found = chooser.choose(logits).tolist()
        for place, one in enumerate(params):
            uniform = torch.rand(1, generator=rngs[place], dtype=torch.float64) if one.temperature else None
            mask = seen[place] if one.repetition_penalty != 1 else None
            assert choose(logits[place : place + 1], one, mask, uniform).tolist() == [found[place]]
            seen[place][0, found[place]] = True
