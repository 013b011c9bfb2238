"""The figures that both the terminal and the page show, worked out once."""

from dataclasses import dataclass

from tnllm_export.verify.judge import STAGE_WORDS
from tnllm_export.verify.records import STAGES, ParityReport, worst


@dataclass(frozen=True)
class StageRow:
    """The worst of one case's stage."""

    case: str
    stage: str
    positions: int
    max_abs: float
    relative: float
    kl: float
    same_top: int
    state: float


@dataclass(frozen=True)
class LayerRow:
    """One layer's worst state error, by stage; None for a stage that was not run."""

    layer: int
    errors: tuple[float | None, ...]


def stage_rows(report: ParityReport) -> list[StageRow]:
    """Return one row for each case and stage, in the order they ran."""
    rows = []
    for case in report.cases:
        for stage in STAGES:
            logits = [item for item in report.logits if (item.case, item.stage) == (case.name, stage)]
            states = [item for item in report.states if (item.case, item.stage) == (case.name, stage)]
            if logits:
                rows.append(
                    StageRow(
                        case=case.name,
                        stage=STAGE_WORDS[stage],
                        positions=len(logits),
                        max_abs=worst(item.max_abs for item in logits),
                        relative=worst(item.relative for item in logits),
                        kl=worst(item.kl for item in logits),
                        same_top=sum(item.same_top for item in logits),
                        state=worst(item.relative for item in states),
                    )
                )
    return rows


def layer_rows(report: ParityReport) -> list[LayerRow]:
    """Return one row for each layer."""
    found: dict[tuple[int, str], list[float]] = {}
    for item in report.states:
        found.setdefault((item.layer, item.stage), []).append(item.relative)
    return [
        LayerRow(layer, tuple(worst(found[layer, stage]) if (layer, stage) in found else None for stage in STAGES))
        for layer in range(report.subject.layers)
    ]


def greedy_tokens(report: ParityReport) -> tuple[int, int]:
    """Return how many greedy tokens agreed before a first difference, and how many there were."""
    return sum(item.agreed for item in report.greedy), sum(item.tokens for item in report.greedy)


def number(value: float | None) -> str:
    """Format an error: three digits, 0 where equal, and the word where it is not finite."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.2e}" if value < 0.01 else f"{value:.3g}"
