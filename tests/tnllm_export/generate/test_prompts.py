"""What is taken as a prompt, and what is refused."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tnllm_export.errors import (
    PromptError,
    RequestError,
    RuntimeTargetError,
    SamplingError,
    StateError,
    TextUnsupportedError,
    TnllmError,
)
from tnllm_export.generate import Generator, SamplingParams
from tnllm_export.models.tokenizer import Tokenizer

from .conftest import ScriptedRuntime


@pytest.fixture
def generator(byte_tokenizer: Tokenizer) -> Generator:
    return Generator(ScriptedRuntime([]), byte_tokenizer, prompt_limit=8)


@pytest.mark.parametrize(
    ("prompts", "ids"),
    [
        ("ab", [(100, 101)]),
        (["ab"], [(100, 101)]),
        (["ab", [7]], [(100, 101), (7,)]),
        ([5, 6], [(5, 6)]),
        ((5, 6), [(5, 6)]),
        ([[5], (6,)], [(5,), (6,)]),
        (np.array([5, 6]), [(5, 6)]),
        ([torch.tensor([5, 6])], [(5, 6)]),
    ],
)
def test_prompts_are_text_or_token_ids_one_or_several(
    generator: Generator, prompts: object, ids: list[tuple[int, ...]]
) -> None:
    assert [found.prompt_ids for found in generator.generate(prompts)] == ids  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "kind", "found"),
    [
        ("", PromptError, "prompt 0 is empty; expected at least one token"),
        (["a", []], PromptError, "prompt 1 is empty"),
        ([], PromptError, "no prompt given"),
        (None, PromptError, "prompt is of type NoneType; expected text or a sequence of token ids"),
        (5, PromptError, "prompt is of type int; expected text"),
        (b"ab", PromptError, "prompt is of type bytes; expected text"),
        (["a", b"b"], PromptError, "prompt 1 is of type bytes; expected text"),
        ("ab\udcff", PromptError, "prompt 0 is no UTF-8 text at character 2; convert it"),
        ("123456789", PromptError, "prompt 0 has 9 tokens; expected at most 8"),
        ([1, 259], PromptError, "prompt 0: token id 259 at 1 is outside the vocabulary; expected 0 … 258"),
        ([[1], [2, -1]], PromptError, "prompt 1: token id -1 at 1"),
        ([[1.5]], PromptError, "prompt 0: 'float' object cannot be interpreted as an integer"),
        ([None], PromptError, "prompt 0: 'NoneType' object is not iterable"),
    ],
)
def test_a_bad_prompt_is_named(generator: Generator, prompts: object, kind: type[TnllmError], found: str) -> None:
    # At the call, not when the stream is read.
    with pytest.raises(kind) as caught:
        generator.stream(prompts)  # type: ignore[arg-type]
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_without_a_tokenizer_is_told_to_use_token_ids() -> None:
    generator = Generator(ScriptedRuntime([]))
    with pytest.raises(TextUnsupportedError, match="no tokenizer; give token ids instead"):
        generator.stream(["text"])
    with pytest.raises(TextUnsupportedError, match="stop strings"):
        generator.stream([[5]], SamplingParams(stop=("x",)))


def test_parameters_and_sessions_must_be_as_many_as_prompts(generator: Generator) -> None:
    with pytest.raises(SamplingError, match="2 sampling parameters; expected 1"):
        generator.stream("a", [SamplingParams()] * 2)
    with pytest.raises(RequestError, match="2 sessions; expected 1"):
        generator.stream("a", sessions=[None, None])


@pytest.mark.parametrize("option", ["prefill_chunk", "prompt_limit"])
def test_sizes_below_one_are_refused(option: str) -> None:
    with pytest.raises(RequestError, match=f"{option} is 0; expected at least 1"):
        Generator(ScriptedRuntime([]), **{option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_generation_with_an_error(bad: float) -> None:
    class Overflowing(ScriptedRuntime):
        def _logits(self, state: Tensor) -> Tensor:
            logits = super()._logits(state)
            logits[1, 7] = bad
            return logits

    with pytest.raises(RuntimeTargetError) as caught:
        Generator(Overflowing([])).generate([[5], [6, 7]])
    assert "logits of prompt 1 after 2 tokens are not finite: float32 overflows on scripted" in str(caught.value)


def test_progress_tells_how_much_of_the_prompts_is_read() -> None:
    told: list[tuple[str, int, int, str]] = []

    def progress(stage: str, done: int, total: int, unit: str = "") -> None:
        told.append((stage, done, total, unit))

    Generator(ScriptedRuntime([]), prefill_chunk=4, progress=progress).generate([[5] * 10, [6] * 3])
    assert told == [("reading the prompt", done, 10, "tokens") for done in (4, 8, 10)]


def test_long_prompts_are_fed_in_pieces_padded_with_the_pad_token() -> None:
    runtime = ScriptedRuntime([])
    Generator(runtime, prefill_chunk=4).generate([[5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15, 16]])
    assert runtime.calls[:2] == [
        [[5, 6, 7, 8], [11, 0, 0, 0], [12, 13, 14, 15]],
        [[9, 10], [0, 0], [16, 0]],
    ]


def test_a_state_error_is_raised_at_the_call(generator: Generator, torch_runtime: object) -> None:
    foreign = Generator(torch_runtime).generate([[5]], keep_sessions=True)[0].session  # type: ignore[arg-type]
    with pytest.raises(StateError, match="state has 2 layers; expected 1"):
        generator.stream([[5]], sessions=[foreign])
