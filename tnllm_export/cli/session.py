"""What surrounds every command: errors become one line and an exit code, warnings one line, results JSON on request."""

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from rich.console import Console, RenderableType

from tnllm_export.cli.progress import choose_display
from tnllm_export.errors import TnllmError, TnllmWarning

EXIT_INTERNAL = 70
"""A bug (EX_SOFTWARE of sysexits.h)."""

EXIT_IO = 74
"""The operating system refused to read or write a file (EX_IOERR)."""

EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells count."""

EXIT_PIPE = 141
"""Who read our output went away: 128 + SIGPIPE."""

DEBUG = "TNLLM_DEBUG"
"""Set this environment variable to see tracebacks and all warnings."""

_WIDTH_OF_FILES = 120


class Session:
    """One run of a command.

    Attributes:
        json: Whether to print one JSON document instead of text.
        document: The result, in JSON's types; set by the command.
        progress: To be passed on to whatever takes long.
    """

    def __init__(self, json_output: bool) -> None:
        self.json = json_output
        self.document: dict[str, Any] = {}
        self._stderr = Console(stderr=True, soft_wrap=True, highlight=False)
        self.progress = choose_display(json_output, self._stderr)

    def print(self, what: RenderableType) -> None:
        """Print for people, on stdout; nothing where JSON was asked for."""
        if not self.json:
            width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
            # Paths may hold what rich takes for markup, and are copied: no wrapping.
            _Output(width=width, highlight=False).print(what, markup=False, soft_wrap=isinstance(what, str))

    def write(self, text: str) -> None:
        """Write text on stdout as it is and at once; nothing where JSON was asked for."""
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, line: str) -> None:
        """Say something in passing, on stderr, to somebody who is watching."""
        if not self.json and self._stderr.is_terminal:
            self._stderr.print(line, style="dim", markup=False)

    def say(self, kind: str, message: str) -> None:
        """Print `kind: message` as one line on stderr."""
        style = "bold red" if kind.endswith("error") else "yellow"
        self._stderr.print(f"{kind}: ", style=style, end="", markup=False)
        self._stderr.print(" ".join(message.split()), markup=False)

    def finish(self, error: dict[str, Any] | None = None) -> None:
        """Print the JSON document, where it was asked for, with the error that ended the command."""
        self.progress.close()
        if self.json:
            document = self.document if error is None else {**self.document, "error": error}
            print(json.dumps(document, ensure_ascii=False, allow_nan=False))
        sys.stdout.flush()

    def fail(self, kind: str, name: str, message: str, exit_code: int) -> typer.Exit:
        """Report an error and return the exit to raise."""
        self.progress.close()
        self.say(kind, message)
        report = {"type": name, "message": " ".join(message.split()), "exit_code": exit_code}
        try:
            try:
                self.finish(report)
            except ValueError:  # the document is what JSON can't say
                self.document = {}
                self.finish(report)
        except BrokenPipeError:
            raise
        except OSError:
            # Stdout is what failed: the line on stderr has to do.
            _forget(sys.stdout)
        return typer.Exit(exit_code)


class _Output(Console):
    """A console that leaves a reader who went away to `session`, where rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Pass the error on."""
        raise BrokenPipeError


@contextmanager
def session(json_output: bool) -> Iterator[Session]:
    """Run a command's body; whatever it raises ends in an exit code and at most one line."""
    current = Session(json_output)
    try:
        try:
            with _warnings_as_lines(current):
                yield current
            current.finish()
        except Exception as error:
            if _follows_interrupt(error):
                raise KeyboardInterrupt from None
            # From within, so that a reader who goes away while the error is printed is noticed too.
            raise _exit_for(error, current) from None
    except KeyboardInterrupt:
        raise current.fail(
            "interrupted", "KeyboardInterrupt", "nothing was left half-written", EXIT_INTERRUPTED
        ) from None
    except BrokenPipeError:
        current.progress.close()
        _forget(sys.stdout)
        raise typer.Exit(EXIT_PIPE) from None


def _exit_for(error: Exception, current: Session) -> Exception:
    """Report an error and return what to raise instead of it."""
    name = type(error).__name__
    match error:
        case typer.BadParameter():
            # The line on stderr, with the usage above it, is typer's.
            current.finish({"type": name, "message": error.format_message(), "exit_code": error.exit_code})
            return error
        case typer.Exit() | BrokenPipeError():
            return error
        case TnllmError():
            return current.fail("error", name, str(error), error.exit_code)
        case OSError(filename=None):
            # Files say their name: what has none is stdin or stdout.
            message = f"{error.strerror or error}; check where input comes from and output goes"
            return current.fail("error", name, message, EXIT_IO)
        case OSError():
            message = f"{error.filename}: {error.strerror}; check the path and its permissions"
            return current.fail("error", name, message, EXIT_IO)
        case _:
            if os.environ.get(DEBUG):
                traceback.print_exception(error)
            hint = f"please report; run with {DEBUG}=1 for the traceback"
            return current.fail("internal error", name, f"{name}: {error}; {hint}", EXIT_INTERNAL)


def _follows_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C led to an error: packages that it meets while they are imported raise others instead."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def _warnings_as_lines(current: Session) -> Iterator[None]:
    """Show each of our warnings once, as a line; other people's only to who debugs."""
    said: set[str] = set()
    show_others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, TnllmWarning):
            show_others(message, category, filename, lineno, file, line)
        elif str(message) not in said:
            said.add(str(message))
            current.say("warning", str(message))

    with warnings.catch_warnings():
        if not os.environ.get(DEBUG):
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", TnllmWarning)
        warnings.showwarning = show  # catch_warnings puts the old one back
        yield


def run_app(app: Callable[[], object]) -> None:
    """Run the command line; input and output that fail outside a command, as below `--help`, end as in one."""
    try:
        app()
    except SystemExit as end:
        # Where a reader goes away, typer and rich exit with 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        code = EXIT_PIPE
    except BrokenPipeError:
        code = EXIT_PIPE
    except OSError as error:
        code = EXIT_IO
        try:
            _exit_for(error, Session(json_output=False))
        except OSError:
            _forget(sys.stderr)  # it is what failed
    else:
        return
    _forget(sys.stdout)
    sys.exit(code)


def _forget(stream: TextIO) -> None:
    """Let Python's own flush at exit go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
