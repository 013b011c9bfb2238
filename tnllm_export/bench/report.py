"""A bench report on the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tnllm_export.bench.digest import (
    COLUMNS,
    Section,
    ceilings_in_words,
    cells,
    constant_cost,
    gigabytes,
    model_in_words,
    sections,
)
from tnllm_export.bench.records import BenchReport


def terminal_report(report: BenchReport) -> RenderableType:
    """Return what was measured, the runtimes, and a table for each sweep, as something rich prints."""
    head = Text.assemble((report.bundle, "bold"), f" ({report.dtype}) on {report.device_name}, {report.seconds:.1f} s")
    parts: list[RenderableType] = [
        head,
        f"{model_in_words(report)}; weights {gigabytes(report.weight_bytes)}, "
        f"state {gigabytes(report.state_bytes)} per sequence",
        f"the device {ceilings_in_words(report)}",
        "",
        _runtimes(report),
    ]
    for section in sections(report):
        if any(section.rows(result) for result in report.timed):
            parts += ["", _sweep(report, section)]
    constant = [line for result in report.timed if (line := constant_cost(report, result))]
    if constant:
        parts += ["", Text("Does a token cost the same after a long context?", "bold"), *constant]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", header_style="dim")
    return table


def _runtimes(report: BenchReport) -> Table:
    table = _table("Runtimes", "runtime", "version", "lowering", "logits against eager", "loaded", "")
    table.columns[-1].justify = "left"
    table.columns[-1].overflow = "fold"
    for result in report.results:
        if result.parity is None:
            parity = Text("–")
        else:
            agrees = result.parity.passed
            parity = Text(
                f"{result.parity.logits:.1e} {'pass' if agrees else 'FAIL'}", "green" if agrees else "bold red"
            )
        note = Text(result.error, "yellow")
        table.add_row(result.runtime, result.version, result.lowering or "none", parity, gigabytes(result.loaded), note)
    return table


def _sweep(report: BenchReport, section: Section) -> Table:
    table = _table(section.title, section.axis, "runtime", *COLUMNS)
    table.columns[0].justify = "right"
    table.columns[1].justify = "left"
    table.caption = section.note
    table.caption_justify = "left"
    for case in section.cases:
        size = section.size(case)
        for result in report.timed:
            row = result.row(section.program, *case)
            if row is None:
                continue
            first, *others = cells(row)
            median = Text(row.note, "yellow") if row.note else Text(first)
            table.add_row(f"{size:,}", result.runtime, median, *others)
    return table
