"""Text in, text out: characters over several tokens, stop strings, ends."""

import pytest

from tnllm_export.generate import Event, Generator, SamplingParams
from tnllm_export.models.tokenizer import Tokenizer

from .conftest import EOS, ScriptedRuntime

PROMPT = "Say: "


def says(text: str, tokenizer: Tokenizer, *, prompt: str = PROMPT) -> Generator:
    """Return a generator whose model continues the prompt with `text`, then with its end token."""
    script = [0] * (len(prompt.encode()) - 1) + tokenizer.encode(text)
    # script[n] follows n tokens, so the first one follows the whole prompt.
    return Generator(ScriptedRuntime([0, *script]), tokenizer)


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events]


def test_text_goes_on_until_the_end_token(byte_tokenizer: Tokenizer) -> None:
    (found,) = says("hello", byte_tokenizer).generate(PROMPT)
    assert (found.text, found.finish_reason) == ("hello", "eos")
    assert found.token_ids == (*byte_tokenizer.encode("hello"), EOS)
    assert found.prompt_ids == tuple(byte_tokenizer.encode(PROMPT))


def test_the_end_token_can_be_ignored(byte_tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_new_tokens=9, stop_at_eos=False)
    (found,) = says("hello", byte_tokenizer).generate(PROMPT, params)
    assert (found.text, found.finish_reason) == ("hello", "length")
    assert found.token_ids[-4:] == (EOS,) * 4


def test_generation_ends_at_the_maximum_length(byte_tokenizer: Tokenizer) -> None:
    generator = says("hello", byte_tokenizer)
    (found,) = generator.generate(PROMPT, SamplingParams(max_new_tokens=3))
    assert (found.text, found.finish_reason) == ("hel", "length")
    assert isinstance(generator.runtime, ScriptedRuntime)
    assert len(generator.runtime.calls) == 1 + 2  # the last token is not fed


def test_no_new_tokens_means_reading_only(byte_tokenizer: Tokenizer) -> None:
    (found,) = says("hello", byte_tokenizer).generate(PROMPT, SamplingParams(max_new_tokens=0))
    assert (found.text, found.token_ids, found.finish_reason) == ("", (), "length")
    assert found.tokens_per_second == 0


@pytest.mark.parametrize("text", ["naïve", "日本語", "👩‍🚀!", "aé日👍z"])
def test_characters_over_several_tokens_come_whole(byte_tokenizer: Tokenizer, text: str) -> None:
    events = list(says(text, byte_tokenizer).stream(PROMPT))
    assert "".join(texts(events)) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in texts(events))
    assert len(events) == len(text.encode()) + 1


def test_a_character_cut_off_by_the_maximum_length_is_shown_as_broken(byte_tokenizer: Tokenizer) -> None:
    (found,) = says("日本", byte_tokenizer).generate(PROMPT, SamplingParams(max_new_tokens=4))
    assert found.text == "日\N{REPLACEMENT CHARACTER}"


def test_a_character_that_the_prompt_begins_is_finished(byte_tokenizer: Tokenizer) -> None:
    whole = byte_tokenizer.encode("日")
    runtime = ScriptedRuntime([0, *whole[1:], *byte_tokenizer.encode("x")])
    (found,) = Generator(runtime, byte_tokenizer).generate(whole[:1])
    assert found.text == "日x"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two END three", ("END",), "one two "),
        ("END", ("END",), ""),
        ("a日本b", ("本",), "a日"),
        ("first\n\nsecond", ("\n\n", "second"), "first"),
    ],
)
def test_text_ends_before_a_stop_string_over_token_boundaries(
    byte_tokenizer: Tokenizer, text: str, stop: tuple[str, ...], shown: str
) -> None:
    events = list(says(text, byte_tokenizer).stream(PROMPT, SamplingParams(stop=stop)))
    whole = events[-1].generation
    assert whole is not None
    assert (whole.text, whole.finish_reason) == (shown, "stop")
    assert "".join(texts(events)) == shown
    assert byte_tokenizer.decode(whole.token_ids).startswith(shown + text[len(shown) : len(shown) + 1])


def test_what_only_began_like_a_stop_string_is_shown_in_the_end(byte_tokenizer: Tokenizer) -> None:
    events = list(says("go EN", byte_tokenizer).stream(PROMPT, SamplingParams(stop=("END",))))
    assert texts(events) == ["g", "o", " ", "", "", "EN"]
    events = list(says("go EN", byte_tokenizer).stream(PROMPT, SamplingParams(stop=("END",), max_new_tokens=5)))
    assert texts(events) == ["g", "o", " ", "", "EN"]


def test_a_stop_string_may_hold_what_a_broken_character_shows(byte_tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("\N{REPLACEMENT CHARACTER}",), max_new_tokens=2)
    (found,) = says("a日", byte_tokenizer).generate(PROMPT, params)
    assert (found.text, found.finish_reason) == ("a", "stop")


def test_a_stop_string_in_the_prompt_does_not_count(byte_tokenizer: Tokenizer) -> None:
    prompt = "END: "
    (found,) = says("hello", byte_tokenizer, prompt=prompt).generate(prompt, SamplingParams(stop=("END", ": h")))
    assert found.text == "hello"


def test_events_tell_tokens_and_their_order(byte_tokenizer: Tokenizer) -> None:
    events = list(says("ab", byte_tokenizer).stream([PROMPT, PROMPT]))
    assert [event.index for event in events] == [0, 1, 0, 1, 0, 1]
    assert [event.token_id for event in events[::2]] == [*byte_tokenizer.encode("ab"), EOS]
    assert [event.finish_reason for event in events] == [None] * 4 + ["eos"] * 2
    assert all((event.generation is None) == (event.finish_reason is None) for event in events)


def test_without_a_tokenizer_there_are_tokens_and_no_text(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode(PROMPT)
    generator = Generator(says("hi", byte_tokenizer).runtime)
    (found,) = generator.generate(ids)
    assert found.text == ""
    assert found.token_ids == (*byte_tokenizer.encode("hi"), EOS)


def test_an_ended_sequence_leaves_the_batch(byte_tokenizer: Tokenizer) -> None:
    generator = says("abcdef", byte_tokenizer)
    params = [SamplingParams(max_new_tokens=count) for count in (2, 5, 0, 1)]
    found = generator.generate([PROMPT] * 4, params)
    assert [generation.text for generation in found] == ["ab", "abcde", "", "a"]
    assert isinstance(generator.runtime, ScriptedRuntime)
    assert [len(call) for call in generator.runtime.calls] == [4, 2, 1, 1, 1]
