"""Steps of a batch that is being generated: one after the other, or one ahead of what the host has seen.

A step that a device runs takes long beside what the host does for it, unless the model is small: then the device waits
while the host reads a token, looks for ends and starts the next step. So where a runtime can, the next step is started
on the token that the device chose, before the host has seen it. What was started in vain, since that token ended a
sequence, has fed the token and knows the logits behind it: a session that is kept says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tnllm_export.errors import RuntimeTargetError
from tnllm_export.generate.choices import Chooser
from tnllm_export.generate.sequence import RunningSequence
from tnllm_export.runtime import Runtime, RuntimeInfo, State
from tnllm_export.runtime.ahead import HostCopy, RunsAhead, Underway


class Decoding:
    """Feeds each token once it is known on the host.

    Attributes:
        state: Of the batch, after all that was fed.
    """

    def __init__(self, runtime: Runtime, state: State) -> None:
        self.state = state
        self._runtime = runtime
        self._chooser: Chooser | None = None

    @property
    def under_way(self) -> bool:
        """Whether a step has been started whose tokens nobody has read."""
        return False

    def next_tokens(self, rows: Sequence[RunningSequence]) -> list[int]:
        """Feed each row's pending token and return the one chosen behind it. Raises RuntimeTargetError."""
        input_ids, positions = _pending(rows)
        logits, self.state = self._runtime.decode(input_ids, positions, self.state)
        self._chooser = self._chooser or Chooser(rows, logits.device)
        return tokens_behind(logits, rows, self._chooser, self._runtime.info)

    def logits(self, place: int) -> Tensor | None:
        """Logits [vocab] behind the last token of a row, on the host, where it was fed already."""
        return None

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some rows only: ended sequences cost nothing more."""
        self.state = self._runtime.device_state(self.host_state(places))
        self._chooser = None

    def host_state(self, places: Sequence[int]) -> list[Tensor]:
        """Copy the state of some rows to the host: one [rows, H, K, V] per layer."""
        return [tensor[places] for tensor in self._runtime.host_state(self.state)]


class DecodingAhead(Decoding):
    """Starts each step before the host has seen the token that it feeds, unless that one is bound to be the last."""

    def __init__(self, runtime: RunsAhead, state: State, *, keep_logits: bool) -> None:
        """Decode ahead.

        Args:
            runtime: One that runs ahead.
            state: Of the batch.
            keep_logits: Whether `logits` will be asked for.
        """
        super().__init__(runtime, state)
        self._ahead = runtime
        self._keep_logits = keep_logits
        self._step: _Step | None = None
        self._read: tuple[list[int], list[float]] | None = None

    @property
    def under_way(self) -> bool:
        """Whether a step has been started whose tokens nobody has read."""
        return self._step is not None

    @torch.inference_mode()
    def next_tokens(self, rows: Sequence[RunningSequence]) -> list[int]:
        """Read the tokens of the step that is under way, once the one after it is."""
        if self._read is None:
            step = self._step or self._first(rows)
            # A sequence that is bound to end leaves the batch before anything else is fed.
            self._step = self._following(rows, step) if all(row.left > 1 for row in rows) else None
            found = step.wait()
        else:
            found, self._read = self._read, None
        tokens, best = found
        _check_finite(best, rows, self._runtime.info)
        return tokens

    def logits(self, place: int) -> Tensor | None:
        """Logits [vocab] of the step that is under way, which feeds what was read last."""
        if self._step is None or self._step.logits is None:
            return None
        return self._step.logits[place].to("cpu", copy=True)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some rows; what is under way for them is read."""
        if self._step is not None:
            tokens, best = self._step.wait()
            self._read = [tokens[place] for place in places], [best[place] for place in places]
            self._step = None
        self.state = self._ahead.select(self.state, places)

    def host_state(self, places: Sequence[int]) -> list[Tensor]:
        """Copy the state of some rows, and of no others, to the host."""
        return self._ahead.host_state(self._ahead.select(self.state, places))

    def _first(self, rows: Sequence[RunningSequence]) -> "_Step":
        """Start a step on tokens that the host knows."""
        step = self._ahead.decode_ahead(*_pending(rows), self.state)
        self._chooser = Chooser(rows, step[0].logits.device) if Chooser.needed(rows) else None
        return self._started(*step)

    def _following(self, rows: Sequence[RunningSequence], step: "_Step") -> "_Step":
        """Start a step on the tokens that another one will have chosen."""
        for row in rows:
            row.position += 1
        chosen = None if step.chosen is None else step.chosen[:, None]
        return self._started(*self._ahead.decode_ahead(chosen, None, self.state))

    def _started(self, work: Underway, state: State) -> "_Step":
        """Enqueue the choice of the tokens behind a step, where it is not the step's own."""
        self.state = state
        logits = work.logits.clone() if self._keep_logits else None
        if self._chooser is None:
            return _Step(work, None, None, logits)
        chosen = self._chooser.choose(work.logits)
        return _Step(work, chosen, HostCopy(chosen).start(chosen), logits)


@dataclass(frozen=True)
class _Step:
    """A step that was started.

    Attributes:
        work: What the runtime does.
        chosen: Tokens [B] on the device, where others than the likeliest may be wanted.
        arriving: The same on their way to the host.
        logits: [B, vocab] in memory of their own, where they are kept.
    """

    work: Underway
    chosen: Tensor | None
    arriving: HostCopy | None
    logits: Tensor | None

    def wait(self) -> tuple[list[int], list[float]]:
        """Return each row's next token, and the logit of its likeliest one."""
        tokens, best = self.work.wait()
        return tokens if self.arriving is None else self.arriving.wait().tolist(), best


def make_decoding(runtime: Runtime, state: State, *, keep_logits: bool) -> Decoding:
    """Return the way to decode that suits a runtime; `keep_logits`: whether `Decoding.logits` will be asked for."""
    if runtime.info.runs_ahead:
        return DecodingAhead(cast(RunsAhead, runtime), state, keep_logits=keep_logits)
    return Decoding(runtime, state)


def tokens_behind(logits: Tensor, rows: Sequence[RunningSequence], chooser: Chooser, info: RuntimeInfo) -> list[int]:
    """Choose each row's next token from logits [B, vocab]. Raises RuntimeTargetError where they are not finite."""
    # The largest is NaN where any is; -inf below it does no harm.
    _check_finite(logits.amax(dim=-1).tolist(), rows, info)
    tokens: list[int] = chooser.choose(logits).tolist()
    return tokens


def _pending(rows: Sequence[RunningSequence]) -> tuple[Tensor, Tensor]:
    """Return each row's pending token [B, 1] and its position [B], and count it as fed."""
    pending = torch.tensor([row.unread for row in rows]), torch.tensor([row.position for row in rows])
    for row in rows:
        row.position += 1
    return pending


def _check_finite(best: Sequence[float], rows: Sequence[RunningSequence], info: RuntimeInfo) -> None:
    for row, logit in zip(rows, best, strict=True):
        if not math.isfinite(logit):
            raise RuntimeTargetError(
                f"logits of prompt {row.index} after {len(row.history)} tokens are not finite: {info.dtype} overflows "
                f"on {info.name}; export with --dtype float32"
            )
