"""Bars on a terminal, lines elsewhere, silence beside JSON."""

import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from tnllm_export.cli import progress
from tnllm_export.cli.progress import Bars, Lines, Silence, choose_display


def test_the_display_fits_the_place():
    terminal, file = Console(force_terminal=True, file=io.StringIO()), Console(file=io.StringIO())
    assert isinstance(choose_display(True, terminal), Silence)
    assert isinstance(choose_display(False, terminal), Bars)
    assert isinstance(choose_display(False, file), Lines)


def test_bars_show_bytes_and_vanish():
    screen = io.StringIO()
    bars = Bars(Console(force_terminal=True, file=screen, width=100))
    bars("writing weights", 0, 4_000_000, "bytes")
    bars("tracing", 0, 1)
    bars("writing weights", 1_000_000, 4_000_000, "bytes")
    bars._live.refresh()
    assert "writing weights" in screen.getvalue()
    assert "1.0 MB of 4.0 MB" in screen.getvalue()
    bars("tracing", 1, 1)
    bars("writing weights", 4_000_000, 4_000_000, "bytes")
    assert bars._live is None


def test_what_is_done_at_once_shows_nothing(capsys):
    screen = io.StringIO()
    for display in (Bars(Console(force_terminal=True, file=screen)), Lines()):
        display("checking", 1, 1)
        display.close()
    assert screen.getvalue() == ""
    assert capsys.readouterr().err == ""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.04)


def test_lines_speak_up_when_a_stage_takes_long(capsys, impatient):
    lines = Lines()
    lines("quick", 0, 1)
    lines("quick", 1, 1)
    lines("slow", 0, 1)
    time.sleep(0.2)
    lines("slow", 1, 1)
    assert capsys.readouterr().err == "slow …\n"


def test_lines_count_from_time_to_time(capsys, impatient):
    lines = Lines()
    lines("feeding", 0, 100, "tokens")
    time.sleep(0.2)
    for done in range(1, 50):
        lines("feeding", done, 100, "tokens")
    lines.close()
    assert capsys.readouterr().err.splitlines() == ["feeding …", "feeding: 1 of 100 tokens (1 %)"]


class Slow(dict):
    """A dict that gives way to other threads between a question and what is done about the answer."""

    def __contains__(self, key):
        found = super().__contains__(key)
        time.sleep(0.002)
        return found

    def values(self):
        for value in super().values():
            time.sleep(0.002)
            yield value

    def __bool__(self):
        empty = not len(self)
        time.sleep(0.002)
        return not empty


@pytest.mark.parametrize("kind", [Bars, Lines])
def test_several_threads_may_report_at_once(kind):
    screen = io.StringIO()
    display = Bars(Console(force_terminal=True, file=screen)) if kind is Bars else Lines()
    (name,) = (name for name in ("_tasks", "_stages") if hasattr(display, name))
    setattr(display, name, Slow())

    def report(stage):
        for done in (0, 1, 2):
            display(stage, done, 2, "bytes")
        return stage

    def close(_):
        display.close()
        return "closed"

    work = [(report, "weights"), (report, "graphs"), (close, None)] * 8
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            ended = list(pool.map(lambda item: item[0](item[1]), work))
    finally:
        sys.setswitchinterval(switch)
    assert ended == ["weights", "graphs", "closed"] * 8
    display.close()
    assert len(getattr(display, name)) == 0
    if kind is Bars:
        assert display._live is None
