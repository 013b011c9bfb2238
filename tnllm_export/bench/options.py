"""What is measured, and for how long."""

import math
from dataclasses import dataclass

from tnllm_export.errors import RequestError

MOST = 2**31 - 1
"""Tokens, or sequences, of one case."""


@dataclass(frozen=True)
class BenchOptions:
    """The cases of a run.

    Attributes:
        prompt_lengths: Prompts of one sequence, in tokens, each fed in one call.
        contexts: Tokens before the decoded ones, for one sequence.
        batches: Sequences that are decoded, and generated, together, after the first of `contexts`.
        tokens: Tokens that are decoded in each case.
        time_limit: Seconds for everything that is timed. Runtimes share them; what finds none left is not measured.

    Raises:
        RequestError: A part of it is empty, not positive, or beyond what a case can have.
    """

    prompt_lengths: tuple[int, ...] = (128, 512, 2048)
    contexts: tuple[int, ...] = (128, 1024, 8192, 131072)
    batches: tuple[int, ...] = (1, 8)
    tokens: int = 64
    time_limit: float = 300.0

    def __post_init__(self) -> None:
        for name, option, values in (
            ("prompt_lengths", "--prompt-lengths", self.prompt_lengths),
            ("contexts", "--contexts", self.contexts),
            ("batches", "--batches", self.batches),
        ):
            if not values or min(values) < 1 or max(values) > MOST:
                raise RequestError(
                    f"{name} is {list(values)}; expected at least one number, each of 1 to {MOST} ({option} 1,2,3)"
                )
        if not 1 <= self.tokens <= MOST:
            raise RequestError(f"tokens is {self.tokens}; expected 1 to {MOST} (--tokens 64)")
        if not 0 < self.time_limit < math.inf:
            raise RequestError(f"time_limit is {self.time_limit:g}; expected some seconds (--time-limit 300)")

    @property
    def decode_cases(self) -> tuple[tuple[int, int], ...]:
        """(batch, context) of each decode case, the two sweeps without repeats: contexts first, then batches."""
        over_context = [(1, context) for context in self.contexts]
        return tuple(dict.fromkeys([*over_context, *self.generate_cases]))

    @property
    def generate_cases(self) -> tuple[tuple[int, int], ...]:
        """(batch, context) of each generation."""
        return tuple((batch, self.contexts[0]) for batch in dict.fromkeys(self.batches))
