"""A bench report as one HTML page that needs nothing else."""

from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from tnllm_export.bench.digest import (
    COLUMNS,
    Section,
    best,
    ceilings_in_words,
    cells,
    constant_cost,
    gigabytes,
    milliseconds,
    model_in_words,
    percent,
    sections,
)
from tnllm_export.bench.figures import plots
from tnllm_export.bench.records import BenchReport, RuntimeResult
from tnllm_export.bundle import files
from tnllm_export.bundle.outputs import check_output
from tnllm_export.errors import WriteError

_MARK = b'<meta name="generator" content="tnllm bench">'
_HEAD_BYTES = 1024


def check_page(path: Path) -> Path:
    """Return where a page shall be written. Raises WriteError before any work is done, where that can't be.

    An earlier page may be replaced, no other file.
    """
    check_output(path, "a report of tnllm bench", _is_page)
    if not path.parent.is_dir():
        raise WriteError(f"{path}: can't be written; expected a file in a folder that exists")
    return path


def write_page(report: BenchReport, path: Path) -> None:
    """Write the page, whole or not at all. Raises WriteError."""
    check_page(path)
    with files.reporting_write_errors(path):
        files.replace(path, html_page(report).encode())


def html_page(report: BenchReport) -> str:
    """Return the page: the best figures at the top, then runtimes, plots and tables."""
    template = resources.files("tnllm_export.bench").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(report.bundle),
        lead=escape(
            f"{model_in_words(report)}, in {report.dtype}, on {report.device_name}. In this run the device "
            f"{ceilings_in_words(report)}: rooflines are what bytes and FLOPs take at these rates."
        ),
        cards="".join(_cards(report)),
        runtimes="\n".join(_runtime_row(result) for result in report.results),
        reference=escape(report.reference),
        plots="\n".join(
            f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p><figure>{svg}</figure></section>'
            for title, note, svg in plots(report)
        ),
        tables="\n".join(_table(report, section) for section in sections(report)),
        constant="".join(
            f"<li>{escape(line)}</li>" for result in report.timed if (line := constant_cost(report, result))
        )
        or "<li>not measured: it takes two contexts</li>",
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(report)),
    )


def _cards(report: BenchReport) -> Iterable[str]:
    prompts, contexts = report.options["prompt_lengths"], report.options["contexts"]
    batch = max(report.options["batches"])
    for name, case in (
        (f"decode, after {contexts[0]:,} tokens", ("decode", 1, contexts[0])),
        (f"generation of {batch} {'sequence' if batch == 1 else 'sequences'}", ("generate", batch, contexts[0])),
        (f"first token of {max(prompts):,}", ("prefill", 1, max(prompts))),
    ):
        found = best(report, *case)
        if found is None:
            yield _card(name, "–", "not measured")
            continue
        result, row = found
        assert row.times is not None
        figures = f"{row.tokens_per_second:,.0f} tokens/s, {percent(row.of_roofline)} of the roofline"
        yield _card(name, f"{milliseconds(row.times.median)} ms", f"{result.runtime}: {figures}")
    found = best(report, "decode", 1, contexts[0])
    least = report.weight_bytes + report.state_bytes
    peak = None if found is None else found[1].memory
    yield _card("peak memory of that decode", gigabytes(peak), f"weights and one state: {gigabytes(least)}")


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _MARK in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _card(name: str, figure: str, note: str) -> str:
    return f'<div class="card"><span>{escape(name)}</span><b>{escape(figure)}</b><small>{escape(note)}</small></div>'


def _runtime_row(result: RuntimeResult) -> str:
    if result.parity is None:
        parity = "–"
    else:
        kind, verdict = ("ok", "pass") if result.parity.passed else ("no", "FAIL")
        figures = f"{result.parity.logits:.1e}, limit {result.parity.limit:.1e}"
        parity = f'{figures} <span class="{kind}">{verdict}</span>'
    return (
        f"<tr><td>{escape(result.runtime)}</td><td>{escape(result.version)}</td>"
        f"<td>{escape(result.lowering or 'none')}</td><td>{parity}</td><td>{gigabytes(result.loaded)}</td>"
        f'<td class="wide left">{escape(result.error or f"memory: {result.memory_by}")}</td></tr>'
    )


def _table(report: BenchReport, section: Section) -> str:
    columns = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = []
    for case in section.cases:
        for result in report.timed:
            row = result.row(section.program, *case)
            if row is None:
                continue
            head = f'<tr><td>{section.size(case):,}</td><td class="left">{escape(result.runtime)}</td>'
            if row.note:
                rows.append(f'{head}<td class="wide left" colspan="{len(COLUMNS)}">{escape(row.note)}</td></tr>')
            else:
                rows.append(head + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>")
    return (
        f'<section><h2>{escape(section.title)}</h2><p class="note">{escape(section.note)}</p>'
        '<div class="scroll"><table>'
        f'<tr><th>{escape(section.axis)}</th><th class="left">runtime</th>{columns}</tr>{"".join(rows)}</table></div>'
        "</section>"
    )


def _facts(report: BenchReport) -> list[tuple[str, str]]:
    facts = [
        ("Device", report.device_name),
        ("Model", model_in_words(report)),
        ("dtype", report.dtype),
        ("Weights", gigabytes(report.weight_bytes)),
        ("State of one sequence, at any length", gigabytes(report.state_bytes)),
        ("CPU threads", "each runtime's own choice" if report.threads is None else str(report.threads)),
        ("Tokens decoded per case", str(report.options["tokens"])),
        ("Measured", f"{report.created[:16].replace('T', ' ')} UTC, in {report.seconds:.1f} s"),
    ]
    return [*facts, *((f"Version of {name}", version) for name, version in report.versions.items())]
