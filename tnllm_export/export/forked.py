"""Work in a process of its own beside this one, which cannot run two pieces of Python at once.

A forked process has all that is imported here, so it starts at once. But it has none of this process's threads, and
what they had locked stays locked: a process with threads, of Python or of a library, does the work itself.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from tnllm_export.errors import ExportError
from tnllm_export.progress import Progress

J = TypeVar("J")
T = TypeVar("T")

Work = Callable[[Callable[[], J], Progress], Iterator[T]]
"""Prepares, then asks for its job and gives one answer after the other, telling its progress."""

_THREADS = Path("/proc/self/task")


def can_fork() -> bool:
    """Whether this process has one thread, and so can be forked without loss. Only Linux tells."""
    return sys.platform == "linux" and len(list(_THREADS.iterdir())) == 1


class Forked(Generic[J, T]):
    """Does some work: at once and beside this process where that can be forked, else here, when it is asked for.

    Used as a context manager: work that is left unfinished ends with it.
    """

    def __init__(self, work: Work[J, T]) -> None:
        """Begin with `work`, which prepares until its job is known. Job, answers and errors must be picklable."""
        self._work = work
        self._process = None
        if not can_fork():
            return
        context = multiprocessing.get_context("fork")
        jobs, self._jobs = context.Pipe(duplex=False)
        self._answers, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(work, jobs, sender, (self._jobs, self._answers)))
        self._process.start()
        jobs.close()
        sender.close()  # so that there is an end to what can be received

    def __enter__(self) -> Self:
        return self

    def answers(self, job: J, progress: Progress) -> Iterator[T]:
        """Send the job, and return an iterator over what the work gives; `progress` is told of what the work tells.

        Raises:
            ExportError: The process was killed.
            Exception: What the work raised.
        """
        if self._process is None:
            return self._work(lambda: job, progress)
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended already: it has said why
            self._jobs.send(job)
        return self._receive(progress)

    def _receive(self, progress: Progress) -> Iterator[T]:
        assert self._process is not None
        while True:
            try:
                kind, value = self._answers.recv()
            except EOFError:
                self._process.join()
                raise ExportError(
                    f"a process of the export ended with exit code {self._process.exitcode} and no answer; expected "
                    "graphs, see whether the memory is full"
                ) from None
            if kind == "end":
                return
            if kind == "error":
                raise value
            if kind == "answer":
                yield value
            else:
                progress(*value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._process.close()
        self._jobs.close()
        self._answers.close()


def _answer(work: Work[J, T], jobs: Connection, sender: Connection, others: tuple[Connection, ...]) -> None:
    """Do the work in the forked process, and send what comes of it."""
    for other in others:
        other.close()  # so that no job comes and sending fails once the first process is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others

    def progress(stage: str, done: int, total: int, unit: str = "") -> None:
        sender.send(("progress", (stage, done, total, unit)))

    try:
        try:
            for answer in work(jobs.recv, progress):
                sender.send(("answer", answer))
            sender.send(("end", None))
        except (BrokenPipeError, EOFError):
            raise
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # a traceback itself cannot be sent
            sender.send(("error", error))
    except (BrokenPipeError, EOFError):
        os._exit(1)  # nobody is there any more to be told
