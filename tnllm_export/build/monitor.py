"""TensorRT's progress as ours, and an interrupt that stops a build instead of the process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tnllm_export.progress import Progress

_TOTAL = 1000


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0
    child: str | None = None


class Phases:
    """TensorRT's phases, one inside the other, as one share of the whole.

    Attributes:
        stopped_by: What was raised while TensorRT was building; to be raised again when it has returned.
    """

    def __init__(self, stage: str, progress: Progress) -> None:
        self.stopped_by: BaseException | None = None
        self._stage = stage
        self._progress = progress
        self._phases: dict[str, _Phase] = {}
        self._root: str | None = None
        self._shown = 0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            if parent in self._phases:
                self._phases[parent].child = name
            elif self._root is None:
                self._root = name

    def step(self, name: str, step: int) -> None:
        """Note that a step of a phase is done."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = min(step + 1, self._phases[name].steps)
        self._show()

    def finish(self, name: str) -> None:
        """End a phase."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent in self._phases:
                self._phases[phase.parent].child = None

    def _share(self, name: str | None) -> float:
        phase = self._phases.get(name or "")
        if phase is None:
            return 0.0
        inside = self._share(phase.child) if phase.done < phase.steps else 0.0
        return (phase.done + inside) / phase.steps

    def _show(self) -> None:
        with self._lock:
            # Never backwards, and never done before it is.
            share = min(int(_TOTAL * self._share(self._root)), _TOTAL - 1)
            if share <= self._shown:
                return
            self._shown = share
        self._progress(self._stage, share, _TOTAL)


@contextmanager
def interrupts_stop(phases: Phases) -> Iterator[None]:
    """Let Ctrl-C end a build by `phases.stopped_by`, and be raised when all is done.

    Python would raise it in whichever callback it runs next. TensorRT's logger drops what is raised in it.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        phases.stopped_by = phases.stopped_by or KeyboardInterrupt()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def make_monitor(trt: Any, phases: Phases) -> Any:
    """Return a `trt.IProgressMonitor` that reports to `phases`; nothing that is raised in it reaches TensorRT."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called by TensorRT, from any of its threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._guard(phases.start, phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._guard(phases.finish, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._guard(phases.step, phase_name, step)
            return phases.stopped_by is None

        def _guard(self, call: Any, *arguments: Any) -> None:
            # An exception that leaves a callback ends the process; a step that returns False ends the build.
            try:
                if phases.stopped_by is None:
                    call(*arguments)
            except BaseException as error:
                phases.stopped_by = error

    return Monitor()
