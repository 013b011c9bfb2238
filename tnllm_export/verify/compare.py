"""From two traces of the same case to their differences."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tnllm_export.errors import ParityError
from tnllm_export.verify.measure import kl_divergence, max_abs_error, relative_error
from tnllm_export.verify.records import (
    STAGES,
    GreedyAgreement,
    LogitsDifference,
    Stage,
    StateDifference,
    Yardstick,
)
from tnllm_export.verify.tolerances import TIE_DEVIATIONS, Tolerance
from tnllm_export.verify.trace import GreedyTrace, Place, Trace

_ROWS_AT_ONCE = 64
"""Positions whose logits are widened to float64 together: 64 of 64,000 are 33 MB."""


@dataclass(frozen=True)
class Differences:
    """Everything that two traces of one case were compared in."""

    logits: tuple[LogitsDifference, ...]
    states: tuple[StateDifference, ...]
    greedy: tuple[GreedyAgreement, ...]


def compare(case: str, candidate: Trace, reference: Trace, limits: Tolerance) -> Differences:
    """Compare every stage of the candidate; a prompt in pieces is held against the reference's whole prompt.

    Raises ParityError where a stage has nothing in common with the reference's.
    """
    logits: list[LogitsDifference] = []
    states: list[StateDifference] = []
    for stage in STAGES:
        if stage in candidate.logits:
            against: Stage = "prefill" if stage == "pieces" else stage
            logits += _compare_logits(case, stage, candidate.logits[stage], reference.logits[against])
            states += _compare_states(case, stage, candidate.states[stage], reference.states[against])
    greedy: list[GreedyAgreement] = []
    if candidate.greedy is not None and reference.greedy is not None:
        greedy = _compare_greedy(case, candidate.greedy, reference.greedy, limits)
    return Differences(tuple(logits), tuple(states), tuple(greedy))


def yardsticks(candidate: list[Trace], reference: list[Trace], exact: list[Trace]) -> tuple[Yardstick, Yardstick]:
    """Measure how far candidate and reference, both of a half dtype, are from the float32 model's traces."""
    return (
        Yardstick("logits", _rms(_logits_errors(candidate, exact)), _rms(_logits_errors(reference, exact))),
        Yardstick("state", _rms(_state_errors(candidate, exact)), _rms(_state_errors(reference, exact))),
    )


def _compare_logits(
    case: str, stage: Stage, found: dict[Place, Tensor], expected: dict[Place, Tensor]
) -> list[LogitsDifference]:
    places = [place for place in found if place in expected]
    if not places:
        raise ParityError(f"case {case!r}, {stage}: no position has logits of both runtimes; nothing was compared")
    differences = []
    for start in range(0, len(places), _ROWS_AT_ONCE):
        some = places[start : start + _ROWS_AT_ONCE]
        # [N, vocab]
        x, r = torch.stack([found[place] for place in some]), torch.stack([expected[place] for place in some])
        columns = zip(
            some,
            max_abs_error(x, r).tolist(),
            relative_error(x, r).tolist(),
            kl_divergence(x, r).tolist(),
            (x.argmax(-1) == r.argmax(-1)).tolist(),
            strict=True,
        )
        differences += [
            LogitsDifference(case, stage, row, position, max_abs, relative, kl, same_top)
            for (row, position), max_abs, relative, kl, same_top in columns
        ]
    return differences


def _compare_states(case: str, stage: Stage, found: list[Tensor], expected: list[Tensor]) -> list[StateDifference]:
    if len(found) != len(expected) or any(x.shape != r.shape for x, r in zip(found, expected, strict=False)):
        shapes, wanted = ([list(tensor.shape) for tensor in tensors] for tensors in (found, expected))
        raise ParityError(f"case {case!r}, {stage}: states have shapes {shapes}; expected {wanted}")
    return [
        StateDifference(case, stage, layer, float(max_abs_error(x, r).max()), float(relative_error(x, r).max()))
        for layer, (x, r) in enumerate(zip(found, expected, strict=True))
    ]


def _compare_greedy(case: str, found: GreedyTrace, expected: GreedyTrace, limits: Tolerance) -> list[GreedyAgreement]:
    rows, total = expected.tokens.shape
    agreements = []
    for row in range(rows):
        differs = (found.tokens[row] != expected.tokens[row]).nonzero().flatten().tolist()
        if differs:
            at = differs[0]
            tie = TIE_DEVIATIONS * limits.logits * float(expected.rms[row, at])
            agreements.append(GreedyAgreement(case, row, total, at, float(expected.gap[row, at]), tie))
        else:
            agreements.append(GreedyAgreement(case, row, total, total))
    return agreements


def _logits_errors(found: list[Trace], exact: list[Trace]) -> list[float]:
    errors: list[float] = []
    for x, r in zip(found, exact, strict=True):
        for stage in ("prefill", "decode"):
            places = [place for place in x.logits[stage] if place in r.logits[stage]]
            for place in places:
                errors += relative_error(x.logits[stage][place][None], r.logits[stage][place][None]).tolist()
    return errors


def _state_errors(found: list[Trace], exact: list[Trace]) -> list[float]:
    errors: list[float] = []
    for x, r in zip(found, exact, strict=True):
        for stage in ("prefill", "decode"):
            for mine, theirs in zip(x.states[stage], r.states[stage], strict=True):
                errors += relative_error(mine, theirs).tolist()
    return errors


def _rms(errors: list[float]) -> float:
    """Return the root mean square; NaN of none, so that comparing nothing can't pass."""
    return float(torch.tensor(errors, dtype=torch.float64).square().mean().sqrt())
