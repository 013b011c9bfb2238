"""How long work reports progress without knowing who shows it."""

from typing import Protocol


class Progress(Protocol):
    """Called with a stage's name and how much of it is done; a stage ends when `done == total`."""

    def __call__(self, stage: str, done: int, total: int, unit: str = "") -> None:
        """Report.

        Args:
            stage: What is being done, in the words a user would use, e.g. "writing weights".
            done: How much is done, in `unit`.
            total: How much there is in all.
            unit: "bytes", "tokens", "graphs" …
        """


def silent(stage: str, done: int, total: int, unit: str = "") -> None:
    """Show nothing; the default everywhere."""
