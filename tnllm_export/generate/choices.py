"""The choice of a batch's tokens on the device that has the logits, without waiting for it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tnllm_export.generate.params import SamplingParams
from tnllm_export.generate.sampling import choose
from tnllm_export.generate.sequence import RunningSequence


class Chooser:
    """Chooses for the same rows step by step; rows that share their parameters are chosen for together.

    It remembers the tokens that repetition penalties ask for, from those the rows have seen when it is made on.
    """

    def __init__(self, rows: Sequence[RunningSequence], device: torch.device) -> None:
        self._rows = rows
        self._device = device
        groups: dict[SamplingParams, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(replace(row.params, seed=0, max_new_tokens=0, stop=()), []).append(place)
        self._groups = [_Group(params, places, rows, device) for params, places in groups.items()]

    @staticmethod
    def needed(rows: Sequence[RunningSequence]) -> bool:
        """Whether some row wants another token than the likeliest."""
        return any(row.params.temperature > 0 or row.seen is not None for row in rows)

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next tokens [B] int64 for logits [B, vocab]; each row that is not greedy draws one number."""
        numbers = [row.draw() for row in self._rows]
        uniforms = None
        if any(number is not None for number in numbers):
            drawn = [0.0 if number is None else number for number in numbers]
            host = torch.tensor(drawn, dtype=torch.float64, pin_memory=self._device.type == "cuda")
            uniforms = host.to(self._device, non_blocking=True)
        if len(self._groups) == 1:
            return self._groups[0].choose(logits, uniforms)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=self._device)
        for group in self._groups:
            own = None if uniforms is None else uniforms[group.places]
            tokens[group.places] = group.choose(logits[group.places], own)
        return tokens


class _Group:
    """Rows that share their parameters."""

    def __init__(
        self, params: SamplingParams, places: list[int], rows: Sequence[RunningSequence], device: torch.device
    ) -> None:
        self.places = torch.tensor(places, device=device)
        self._params = params
        seen = [mask for place in places if (mask := rows[place].seen) is not None]
        self._seen = torch.stack(seen).to(device) if seen else None

    def choose(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        tokens = choose(logits, self._params, self._seen, uniforms if self._params.temperature > 0 else None)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], value=True)
        return tokens
