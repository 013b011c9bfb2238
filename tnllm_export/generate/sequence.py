"""One sequence while it is being generated: its tokens, its text and its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tnllm_export.generate.params import SamplingParams
from tnllm_export.generate.session import Session
from tnllm_export.generate.stops import StopMatcher
from tnllm_export.models.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]

# A piece's text depends on the tokens right before it alone: spaces on one, a character's bytes on at most three.
_TEXT_CONTEXT = 32


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for one prompt.

    Attributes:
        index: The prompt's place among the prompts.
        prompt_ids: The prompt's tokens.
        token_ids: The new tokens, with the end token or those of the stop string that ended it.
        text: The new text, without the end token and up to the stop string; "" without a tokenizer.
        finish_reason: "eos", "stop", or "length" for `max_new_tokens`.
        prefill_seconds: Time in which the prompts of the batch were read.
        decode_seconds: Time in which the new tokens were made. What a reader of the stream takes is in it only where
            the runtime runs ahead: it makes the next token meanwhile.
        session: To continue from, where sessions were asked for.
    """

    index: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prefill_seconds: float
    decode_seconds: float
    session: Session | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second of this sequence. The first token comes from the prompt and does not count."""
        decoded = len(self.token_ids) - 1
        return decoded / self.decode_seconds if decoded > 0 and self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Event:
    """One new token of one sequence.

    Attributes:
        index: The prompt's place among the prompts.
        token_id: The token; None where a sequence ends without one (`max_new_tokens` 0).
        text: Text that is settled by now, perhaps "". All of a sequence's texts together are its `Generation.text`.
        finish_reason: Set on the sequence's last event.
        generation: The whole, on the last event.
    """

    index: int
    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None
    generation: Generation | None = None


class Stopwatch:
    """Adds up the time inside its `running` blocks, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of this block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class RunningSequence:
    """One row of a batch. `history` holds all its tokens; the last is pending where it is not in the state yet."""

    def __init__(
        self,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        session: Session | None,
    ) -> None:
        self.index = index
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self.rng = torch.Generator().manual_seed(params.seed)
        self._rng_before = self.rng.get_state()  # the last draw
        self.logits: Tensor | None = None
        self.history: list[int] = []
        if session is not None:
            self.history += session.token_ids
            self.logits = session.logits
            if session.seed == params.seed:
                self.rng.set_state(session.rng)
                self._rng_before = session.rng
        self.position = 0 if session is None else session.position
        self.history += prompt_ids
        self.new_ids: list[int] = []
        self.finished = False
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[self.history] = True
        self._decoder = None if tokenizer is None else tokenizer.decode_stream(self.history[-_TEXT_CONTEXT:])
        self._stops = StopMatcher(params.stop)
        self._text = ""

    @property
    def unread(self) -> list[int]:
        """Tokens that are not in the state yet."""
        return self.history[self.position :]

    @property
    def left(self) -> int:
        """Tokens that may yet come."""
        return self.params.max_new_tokens - len(self.new_ids)

    def draw(self) -> float | None:
        """Draw the number that a token is chosen with; None where the row is greedy."""
        if self.params.temperature == 0:
            return None
        self._rng_before = self.rng.get_state()
        return torch.rand(1, generator=self.rng, dtype=torch.float64).item()

    def start(self) -> Event | None:
        """Return the only event of a sequence that wants no token, else None."""
        return self._finish(None, "", "length") if self.params.max_new_tokens == 0 else None

    def take(self, token: int, eos_token_id: int) -> Event:
        """Append the token that was chosen; its event tells whether the sequence ends with it."""
        self.history.append(token)
        self.new_ids.append(token)
        self.logits = None
        if self.seen is not None:
            self.seen[token] = True
        if token == eos_token_id and self.params.stop_at_eos:
            return self._finish(token, "", "eos")
        piece, stopped = self._stops.push(self._decoder.push(token)) if self._decoder else ("", False)
        if stopped:
            self._text += piece
            return self._event(token, piece, "stop")
        if len(self.new_ids) == self.params.max_new_tokens:
            return self._finish(token, piece, "length")
        self._text += piece
        return self._event(token, piece, None)

    def session(self, state: list[Tensor], row: int, behind: Tensor | None) -> Session:
        """Put the sequence aside.

        Args:
            state: Of some sequences, one [rows, H, K, V] per layer.
            row: This one's place among them.
            behind: Logits [vocab] behind its last token, where that is in the state already and the next one is drawn.
        """
        logits = self.logits if behind is None else behind
        return Session(
            token_ids=tuple(self.history),
            state=tuple(tensor[row : row + 1].clone() for tensor in state),
            logits=None if logits is None else logits.clone(),
            seed=self.params.seed,
            rng=self.rng.get_state() if behind is None else self._rng_before,
        )

    def generation(self, reason: FinishReason, prefill: float, decode: float, session: Session | None) -> Generation:
        """Sum the sequence up; `prefill` and `decode` are seconds."""
        return Generation(
            self.index, self.prompt_ids, tuple(self.new_ids), self._text, reason, prefill, decode, session
        )

    def _finish(self, token: int | None, piece: str, reason: FinishReason) -> Event:
        """End the sequence: what was held back comes out, and may yet hold a stop string."""
        rest, stopped = self._stops.push(self._decoder.flush()) if self._decoder and self.new_ids else ("", False)
        text = piece + rest + ("" if stopped else self._stops.flush())
        self._text += text
        return self._event(token, text, "stop" if stopped else reason)

    def _event(self, token: int | None, text: str, reason: FinishReason | None) -> Event:
        self.finished = reason is not None
        return Event(self.index, token, text, reason)
