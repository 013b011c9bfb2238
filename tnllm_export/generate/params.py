"""How tokens are chosen and when to stop."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from tnllm_export.errors import SamplingError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stop conditions of one sequence.

    Applied in this order: repetition penalty, temperature, top-k, top-p.

    Attributes:
        temperature: Divides the logits; 0 is greedy: always the likeliest token.
        top_k: Only the k likeliest tokens are drawn from; 0: all.
        top_p: Only the fewest likeliest tokens whose probabilities sum to at least p are drawn from; 1: all.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens that the prompt or the
            text so far holds (Keskar et al., arXiv 1909.05858); 1: none.
        seed: Each sequence draws from a generator of its own with this seed, so a batch changes nobody's text.
        max_new_tokens: At most so many tokens are generated; 0 only reads the prompt.
        stop: Generation ends where one of these strings appears; the string is cut off.
        stop_at_eos: Whether the model's end token ends generation.

    Raises:
        SamplingError: A value of another type or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            self._take(name, Real, float, "a number")
        for name in ("top_k", "seed", "max_new_tokens"):
            self._take(name, Integral, int, "an integer")
        if not isinstance(self.stop_at_eos, bool):
            raise SamplingError(f"stop_at_eos is {self.stop_at_eos!r}; expected True or False")
        self._check_ranges()
        self._check_stop()

    def _take(self, name: str, kind: type, plain: Callable[[Any], float], wanted: str) -> None:
        """Make a number of NumPy's or of any other library a plain one; for a field of another type say so."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise SamplingError(f"{name} is {value!r}; expected {wanted}")
        try:
            object.__setattr__(self, name, plain(value))
        except OverflowError as error:
            raise SamplingError(f"{name} is beyond all floats; expected {wanted}") from error

    def _check_ranges(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k}; expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}; expected more than 0, at most 1 (off)")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise SamplingError(f"repetition_penalty is {self.repetition_penalty}; expected more than 0; 1 is off")
        if not 0 <= self.seed < 2**63:
            raise SamplingError(f"seed is {self.seed}; expected 0 … 2^63 - 1")
        if self.max_new_tokens < 0:
            raise SamplingError(f"max_new_tokens is {self.max_new_tokens}; expected 0 or more")

    def _check_stop(self) -> None:
        if isinstance(self.stop, str):
            raise SamplingError(f"stop is the string {self.stop!r}; expected a tuple of strings: ({self.stop!r},)")
        if not isinstance(self.stop, Collection):
            raise SamplingError(f"stop is {self.stop!r}; expected a tuple of strings; () is none")
        for text in self.stop:
            if not isinstance(text, str):
                raise SamplingError(f"stop holds {text!r}; expected strings")
            if not text:
                raise SamplingError("stop holds an empty string; expected strings of at least one character")
