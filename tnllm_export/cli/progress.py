"""How progress is shown: bars on a terminal, now and then a line elsewhere, nothing beside JSON."""

import sys
import threading
import time
from typing import Protocol, Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

QUIET_SECONDS = 2.0
"""Without a terminal, a stage that takes less is not mentioned."""

LINE_SECONDS = 10.0
"""Without a terminal, so much time passes between two lines of one stage."""


class Display(Protocol):
    """A `tnllm_export.progress.Progress` that can be taken off the screen. Several threads may report at once."""

    def __call__(self, stage: str, done: int, total: int, unit: str = "") -> None:
        """Show how much of a stage is done."""

    def close(self) -> None:
        """Remove what is shown; unfinished stages are forgotten."""


def choose_display(json_output: bool, console: Console) -> Display:
    """Return the display that fits where stderr goes."""
    if json_output:
        return Silence()
    return Bars(console) if console.is_terminal else Lines()


class Silence:
    """Shows nothing."""

    def __call__(self, stage: str, done: int, total: int, unit: str = "") -> None:
        """Show nothing."""

    def close(self) -> None:
        """Remove nothing."""


class Bars:
    """One bar per running stage; they vanish when all are done, so that text can be streamed to the same terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.RLock()

    def __call__(self, stage: str, done: int, total: int, unit: str = "") -> None:
        """Draw, move or remove the stage's bar."""
        with self._lock:
            if stage not in self._tasks:
                if done >= total:
                    return
                # A stage that is one step has no share to show: its bar pulses.
                self._tasks[stage] = self._start().add_task(stage, total=total if total > 1 else None, count="")
            live = self._start()
            if done < total:
                live.update(self._tasks[stage], completed=done, count=_count(done, total, unit))
                return
            live.remove_task(self._tasks.pop(stage))
            if not self._tasks:
                self.close()

    def close(self) -> None:
        """Remove all bars."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
            self._live = None
            self._tasks.clear()

    def _start(self) -> Progress:
        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[count]}", style="dim"),
                TimeElapsedColumn(),
            )
            self._live = Progress(*columns, console=self._console, transient=True)
            self._live.start()
        return self._live


class Lines:
    """A line on stderr when a stage has taken two seconds, and every ten seconds from then on."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int, unit: str = "") -> None:
        """Note how far the stage is, and say so where it is time."""
        with self._lock:
            if stage not in self._stages:
                if done >= total:
                    return
                self._stages[stage] = _Stage(stage).start()
            if done >= total:
                self._stages.pop(stage).end()
            else:
                self._stages[stage].advance(done, total, unit)

    def close(self) -> None:
        """End all stages."""
        with self._lock:
            for stage in self._stages.values():
                stage.end()
            self._stages.clear()


class _Stage:
    """One stage of `Lines`. The timer speaks for work that reports nothing for a while."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said = time.monotonic() + QUIET_SECONDS - LINE_SECONDS
        self._timer = threading.Timer(QUIET_SECONDS, self._say, [f"{name} …"])
        self._timer.daemon = True

    def start(self) -> Self:
        self._timer.start()
        return self

    def advance(self, done: int, total: int, unit: str) -> None:
        if total > 1 and time.monotonic() - self._said >= LINE_SECONDS:
            self._timer.cancel()
            self._say(f"{self._name}: {_count(done, total, unit)} ({100 * done // total} %)")

    def end(self) -> None:
        self._timer.cancel()

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        # In one call, line end included: two stages' timers may speak at the same moment.
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _count(done: int, total: int, unit: str) -> str:
    if total <= 1:
        return ""
    if unit == "bytes":
        return f"{decimal(done)} of {decimal(total)}"
    return f"{done:,} of {total:,} {unit}".rstrip()
