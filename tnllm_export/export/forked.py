"""Work in a process of its own beside this one, which cannot run two pieces of Python at once.

A forked process has all that is imported here, so it starts at once. But it has none of this process's threads, and
what they had locked stays locked: a process with threads, of Python or of a library, does the work itself.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from tnllm_export.errors import ExportError
from tnllm_export.progress import Progress

T = TypeVar("T")
_THREADS = Path("/proc/self/task")


def can_fork() -> bool:
    """Whether this process has one thread, and so can be forked without loss. Only Linux tells."""
    return sys.platform == "linux" and len(list(_THREADS.iterdir())) == 1


class Forked(Generic[T]):
    """Does some work: at once and beside this process where that can be forked, else here, when it is asked for.

    Used as a context manager: work that is left unfinished ends with it.
    """

    def __init__(self, work: Callable[[Progress], T]) -> None:
        """Begin with `work`, which gets a progress to tell. Its answer and its errors must be picklable."""
        self._work = work
        self._process = None
        if not can_fork():
            return
        context = multiprocessing.get_context("fork")
        self._answers, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(work, sender, self._answers))
        self._process.start()
        sender.close()  # so that there is an end to what can be received

    def __enter__(self) -> Self:
        return self

    def result(self, progress: Progress) -> T:
        """Return what the work gives, telling `progress` of what it tells.

        Raises:
            ExportError: The process was killed.
            Exception: What the work raised.
        """
        if self._process is None:
            return self._work(progress)
        while True:
            try:
                kind, value = self._answers.recv()
            except EOFError:
                self._process.join()
                raise ExportError(
                    f"a process of the export ended with exit code {self._process.exitcode} and no answer; expected "
                    "graphs, see whether the memory is full"
                ) from None
            if kind == "answer":
                answer: T = value
                return answer
            if kind == "error":
                raise value
            progress(*value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._process.close()
        self._answers.close()


def _answer(work: Callable[[Progress], T], sender: Connection, receiver: Connection) -> None:
    """Do the work in the forked process, and send what comes of it."""
    receiver.close()  # so that sending fails once the first process is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others

    def progress(stage: str, done: int, total: int, unit: str = "") -> None:
        sender.send(("progress", (stage, done, total, unit)))

    message: tuple[str, T | Exception]
    try:
        try:
            message = ("answer", work(progress))
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # a traceback itself cannot be sent
            message = ("error", error)
        sender.send(message)
    except BrokenPipeError:
        os._exit(1)  # nobody is there any more to be told
