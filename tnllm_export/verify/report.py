"""A parity report on the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tnllm_export.verify.digest import greedy_tokens, layer_rows, number, stage_rows
from tnllm_export.verify.judge import STAGE_WORDS
from tnllm_export.verify.records import STAGES, ParityReport


def terminal_report(report: ParityReport) -> RenderableType:
    """Return headline, checks, errors by stage and by layer, and the greedy agreement, as something rich prints."""
    parts: list[RenderableType] = [headline(report), "", _checks(report), "", _stages(report), "", _layers(report)]
    if report.greedy:
        parts += ["", _greedy(report)]
    return Group(*parts)


def headline(report: ParityReport) -> Text:
    """Return PASS or FAIL and what was compared with what, in one line."""
    subject = report.subject
    verdict = Text(" PASS ", "bold white on green") if report.passed else Text(" FAIL ", "bold white on red")
    lowering = f", lowering {subject.lowering}" if subject.lowering else ""
    what = f"{subject.runtime} on {subject.device} ({subject.dtype}{lowering}) against the {report.reference}"
    return Text.assemble(verdict, " ", what, f", seed {report.seed}, {report.seconds:.1f} s")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", header_style="dim")
    return table


def _checks(report: ParityReport) -> Table:
    table = _table("Checks", "claim", "worst", "limit", "compared", "")
    for check in report.checks:
        verdict = Text("pass", "green") if check.passed else Text("FAIL", "bold red")
        table.add_row(check.claim, number(check.measured), number(check.limit), str(check.compared), verdict)
    return table


def _stages(report: ParityReport) -> Table:
    table = _table(
        "Worst by stage", "case", "stage", "positions", "max abs", "relative", "KL (nats)", "same top", "state"
    )
    table.columns[1].justify = "left"
    for row in stage_rows(report):
        figures = (number(row.max_abs), number(row.relative), number(row.kl))
        same = f"{row.same_top}/{row.positions}"
        table.add_row(row.case, row.stage, str(row.positions), *figures, same, number(row.state))
    return table


def _layers(report: ParityReport) -> Table:
    table = _table("Relative error of the state by layer", "layer", *(STAGE_WORDS[stage] for stage in STAGES))
    for row in layer_rows(report):
        table.add_row(str(row.layer), *(number(error) for error in row.errors))
    return table


def _greedy(report: ParityReport) -> Table:
    agreed, total = greedy_tokens(report)
    table = _table(f"Greedy texts: {agreed} of {total} tokens agree", "case", "row", "agree", "at the first difference")
    for item in report.greedy:
        if item.agreed == item.tokens:
            note = Text("–")
        else:
            gap = f"gap {number(item.gap)}, a near tie up to {number(item.tie)}"
            note = Text(gap, "" if item.explained else "bold red")
        table.add_row(item.case, str(item.row), f"{item.agreed}/{item.tokens}", note)
    return table
