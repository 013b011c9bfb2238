"""Stop strings in pieces of text."""

from hypothesis import given
from hypothesis import strategies as st

from tnllm_export.generate.stops import StopMatcher

letters = st.text("ab", max_size=12)


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        text, found = matcher.push(piece)
        shown += text
        if found:
            return shown, True
    return shown + matcher.flush(), False


@given(pieces=st.lists(letters, max_size=6), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    # The stop string that is complete first counts; of two that end together, the longer one.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert run(tuple(stops), pieces) == ((text[: min(ends)[1]], True) if ends else (text, False))


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("Ts") == ("ENTs", False)
    assert matcher.push(" EN") == (" ", False)
    assert matcher.push("D!") == ("", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopMatcher(()).push("anything") == ("anything", False)
