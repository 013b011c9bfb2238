"""What a parity report holds: frozen records that become JSON as they are."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tnllm_export.errors import ParityError

Stage = Literal["prefill", "pieces", "decode"]
"""Where something was compared: after one prefill, after a prefill in pieces, during teacher-forced decoding."""

STAGES: tuple[Stage, ...] = ("prefill", "pieces", "decode")


@dataclass(frozen=True)
class Subject:
    """What was compared with the eager model."""

    runtime: str
    device: str
    dtype: str
    logits: str
    lowering: str | None
    layers: int
    heads: int
    width: int
    vocab_size: int
    bundle: str | None = None


@dataclass(frozen=True)
class CaseSummary:
    """One batch of inputs: prompt lengths of its rows, tokens decoded after each, tokens of free-running greedy."""

    name: str
    description: str
    lengths: tuple[int, ...]
    piece: int
    decoded: int
    greedy: int


@dataclass(frozen=True)
class LogitsDifference:
    """Logits of one position, x against the eager model's r.

    Attributes:
        case: Name of the inputs.
        stage: Where they come from.
        row: Row of the batch.
        position: Position in the row's text of the token that was fed.
        max_abs: max |x - r| over the vocabulary.
        relative: ‖x - r‖ / ‖r‖ over the vocabulary.
        kl: KL(softmax(r) ‖ softmax(x)) in nats.
        same_top: Whether the most likely token is the same.
    """

    case: str
    stage: Stage
    row: int
    position: int
    max_abs: float
    relative: float
    kl: float
    same_top: bool


@dataclass(frozen=True)
class StateDifference:
    """One layer's recurrent state at the end of a stage: the worst row's ‖x - r‖ / ‖r‖ and max |x - r|."""

    case: str
    stage: Stage
    layer: int
    max_abs: float
    relative: float


@dataclass(frozen=True)
class GreedyAgreement:
    """Free-running greedy decoding of one row.

    Attributes:
        case: Name of the inputs.
        row: Row of the batch.
        tokens: Tokens that both chose.
        agreed: How many are the same before the first that differs.
        gap: The eager model's logit gap between its first and second choice where they part; None if they never do.
        tie: A gap up to this is a near tie, which an error within the tolerance can turn; None if they never part.
    """

    case: str
    row: int
    tokens: int
    agreed: int
    gap: float | None = None
    tie: float | None = None

    @property
    def explained(self) -> bool:
        """Whether every token agrees, or the first that differs was a near tie."""
        return self.agreed == self.tokens or (self.gap is not None and self.tie is not None and self.gap <= self.tie)


@dataclass(frozen=True)
class Yardstick:
    """Root-mean-square relative errors against the float32 eager model.

    Attributes:
        quantity: Of what.
        candidate: The runtime's error.
        reference: The error of the eager model in the half dtype, which pays for that dtype too.
    """

    quantity: Literal["logits", "state"]
    candidate: float
    reference: float


@dataclass(frozen=True)
class Check:
    """One claim of the report: the worst of `compared` measurements against its limit. NaN passes no limit."""

    claim: str
    measured: float
    limit: float
    compared: int

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it is within the limit."""
        return self.compared > 0 and self.measured <= self.limit


@dataclass(frozen=True)
class ParityReport:
    """How far a runtime is from the eager model, measured on these inputs."""

    subject: Subject
    reference: str
    seed: int
    cases: tuple[CaseSummary, ...]
    checks: tuple[Check, ...]
    logits: tuple[LogitsDifference, ...]
    states: tuple[StateDifference, ...]
    greedy: tuple[GreedyAgreement, ...]
    yardsticks: tuple[Yardstick, ...]
    versions: dict[str, str]
    created: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check passed; a report without checks never has."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def require_pass(self) -> None:
        """Raise ParityError that names the failed checks, unless all passed."""
        failed = [check for check in self.checks if not check.passed]
        if failed or not self.checks:
            found = "; ".join(f"{check.claim} {check.measured:.3g}, limit {check.limit:.3g}" for check in failed)
            subject = f"{self.subject.runtime} ({self.subject.dtype}, lowering {self.subject.lowering or 'none'})"
            raise ParityError(
                f"{subject} differs from the eager model: {found or 'nothing was compared'}; try another --lowering, "
                f"and report it with the seed {self.seed}"
            )

    def summary(self) -> dict[str, Any]:
        """Return the few figures that a bundle's manifest keeps."""
        return {
            "passed": self.passed,
            "runtime": self.subject.runtime,
            "device": self.subject.device,
            "seed": self.seed,
            "created": self.created,
            "checks": [_check_json(check) for check in self.checks],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the report in types that JSON has; a figure that is not finite becomes null."""
        fields: dict[str, Any] = _finite_or_null(dataclasses.asdict(self))
        fields["checks"] = [_check_json(check) for check in self.checks]
        for item, agreement in zip(fields["greedy"], self.greedy, strict=True):
            item["explained"] = agreement.explained
        return {"passed": self.passed, **fields}


def worst(values: Iterable[float]) -> float:
    """Return the largest value, NaN if any is NaN (`max` would drop it), or 0 of none."""
    largest = 0.0
    for value in values:
        if math.isnan(value):
            return value
        largest = max(largest, value)
    return largest


def _check_json(check: Check) -> dict[str, Any]:
    fields: dict[str, Any] = _finite_or_null(dataclasses.asdict(check))
    return {**fields, "passed": check.passed}


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return value
