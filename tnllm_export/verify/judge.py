"""From differences to a verdict: the checks of a report and their limits."""

import datetime
import platform
from importlib import metadata

from tnllm_export.errors import ParityError
from tnllm_export.runtime.protocol import RuntimeInfo
from tnllm_export.verify.cases import Case
from tnllm_export.verify.compare import Differences, compare, yardsticks
from tnllm_export.verify.records import STAGES, Check, ParityReport, Subject, Yardstick, worst
from tnllm_export.verify.tolerances import Tolerance, tolerance
from tnllm_export.verify.trace import Trace

STAGE_WORDS = {"prefill": "prompt at once", "pieces": "prompt in pieces", "decode": "token by token"}
"""The stages in the words of a report."""


def subject_of(info: RuntimeInfo, *, lowering: str | None = None, bundle: str | None = None) -> Subject:
    """Describe a loaded runtime for a report."""
    config = info.config
    return Subject(
        runtime=info.name,
        device=info.device,
        dtype=info.dtype,
        logits=info.logits,
        lowering=lowering,
        layers=config.decoder_layers,
        heads=config.decoder_attention_heads,
        width=config.decoder_embed_dim,
        vocab_size=config.vocab_size,
        bundle=bundle,
    )


def judge(
    subject: Subject,
    cases: list[Case],
    candidate: list[Trace],
    reference: list[Trace],
    exact: list[Trace] | None,
    *,
    seed: int,
    seconds: float,
) -> ParityReport:
    """Compare traces of the same cases and hold the differences against the tolerances of the dtype.

    Args:
        subject: What is judged.
        cases: What was fed.
        candidate: Its answers.
        reference: Those of the eager model in the same dtype.
        exact: Those of the eager model in float32; needed for a half dtype.
        seed: Of the random case, for the report.
        seconds: How long the runs took, for the report.

    Raises:
        ParityError: Nothing was compared, or a half dtype comes without its yardstick.
        UnsupportedTargetError: There are no tolerances for the dtype.
    """
    limits = tolerance(subject.dtype)
    parts = [
        compare(case.name, mine, theirs, limits) for case, mine, theirs in zip(cases, candidate, reference, strict=True)
    ]
    found = Differences(
        tuple(item for part in parts for item in part.logits),
        tuple(item for part in parts for item in part.states),
        tuple(item for part in parts for item in part.greedy),
    )
    if not found.logits or not found.states:
        raise ParityError("nothing was compared; expected at least one case with one prompt")
    if limits.excess is None:
        sticks: tuple[Yardstick, ...] = ()
    elif exact is None:
        raise ParityError(f"{subject.dtype} is judged beside float32; expected the float32 model's answers too")
    else:
        sticks = yardsticks(candidate, reference, exact)
    return ParityReport(
        subject=subject,
        reference=f"eager PyTorch model in {subject.dtype}",
        seed=seed,
        cases=tuple(case.summary() for case in cases),
        checks=(*_difference_checks(found, limits), *_yardstick_checks(sticks, limits, len(found.logits))),
        logits=found.logits,
        states=found.states,
        greedy=found.greedy,
        yardsticks=sticks,
        versions=_versions(subject.runtime),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=seconds,
    )


def _difference_checks(found: Differences, limits: Tolerance) -> list[Check]:
    checks = []
    for stage in STAGES:
        logits = [item for item in found.logits if item.stage == stage]
        states = [item for item in found.states if item.stage == stage]
        # A stage that a case leaves out (nothing decoded) has no claim; one that ran always has.
        if logits:
            words = STAGE_WORDS[stage]
            relative, kl = worst(item.relative for item in logits), worst(item.kl for item in logits)
            checks += [
                Check(f"logits, {words}: relative error", relative, limits.logits, len(logits)),
                Check(f"logits, {words}: KL divergence", kl, limits.kl, len(logits)),
                Check(f"states, {words}: relative error", worst(s.relative for s in states), limits.state, len(states)),
            ]
    if found.greedy:
        unexplained = sum(not item.explained for item in found.greedy)
        checks.append(Check("greedy texts that part at no near tie", float(unexplained), 0.0, len(found.greedy)))
    return checks


def _yardstick_checks(sticks: tuple[Yardstick, ...], limits: Tolerance, compared: int) -> list[Check]:
    if limits.excess is None:
        return []
    return [
        Check(
            f"{stick.quantity}: error against float32, in units of the eager model's",
            _ratio(stick.candidate, stick.reference),
            limits.excess,
            compared,
        )
        for stick in sticks
    ]


def _ratio(found: float, expected: float) -> float:
    if expected == 0:
        return 1.0 if found == 0 else float("inf")
    return found / expected


def _versions(runtime: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in dict.fromkeys(("tnllm-export", "torch", runtime)):
        versions[name] = _version(name)
    return versions


def _version(name: str) -> str:
    """Of a package, or of its build for GPUs, which comes under a name of its own."""
    for package in (name, f"{name}-gpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "not installed as a package"
