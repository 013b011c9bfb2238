"""A parity report as one HTML page that needs nothing else."""

from collections.abc import Iterable
from html import escape
from importlib import resources
from string import Template

from tnllm_export.verify import figures
from tnllm_export.verify.digest import greedy_tokens, layer_rows, number, stage_rows
from tnllm_export.verify.judge import STAGE_WORDS
from tnllm_export.verify.records import STAGES, ParityReport, worst
from tnllm_export.verify.tolerances import tolerance


def html_page(report: ParityReport) -> str:
    """Return the page: verdict and summary at the top, then checks, plots and tables."""
    template = resources.files("tnllm_export.verify").joinpath("page.html").read_text(encoding="utf-8")
    subject = report.subject
    title = subject.bundle or subject.runtime
    return Template(template).substitute(
        verdict="PASS" if report.passed else "FAIL",
        verdict_class="pass" if report.passed else "fail",
        title=escape(title),
        dtype=escape(subject.dtype),
        lead=escape(_lead(report)),
        cards="".join(_cards(report)),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(report)),
        checks="\n".join(_check_rows(report)),
        by_layer=figures.error_by_layer(report),
        by_position=figures.error_by_position(report),
        kl_by_position=figures.kl_by_position(report),
        greedy="\n".join(_greedy_rows(report)),
        cases=escape(_describe_cases(report)),
        stages="\n".join(_stage_rows(report)),
        yardsticks=_yardstick_section(report),
        layer_columns="".join(f"<th>{escape(STAGE_WORDS[stage])}</th>" for stage in STAGES),
        layers="\n".join(_row(str(row.layer), *map(number, row.errors)) for row in layer_rows(report)),
    )


def _lead(report: ParityReport) -> str:
    subject = report.subject
    verb = "agrees" if report.passed else "does not agree"
    how = f" running the {subject.lowering} graphs" if subject.lowering else ""
    return (
        f"{subject.runtime} on {subject.device}{how} {verb} with the {report.reference}, on fresh random token ids "
        f"(seed {report.seed}){' and on real text' if len(report.cases) > 1 else ''}."
    )


def _cards(report: ParityReport) -> Iterable[str]:
    limits = tolerance(report.subject.dtype)
    agreed, total = greedy_tokens(report)
    figures_with_limits = (
        ("logits, relative error", worst(item.relative for item in report.logits), limits.logits),
        ("logits, KL divergence", worst(item.kl for item in report.logits), limits.kl),
        ("states, relative error", worst(item.relative for item in report.states), limits.state),
    )
    for name, value, limit in figures_with_limits:
        yield (
            f'<div class="card"><span>{name}</span><b class="{"" if value <= limit else "no"}">{number(value)}</b>'
            f"<small>worst; limit {number(limit)}</small></div>"
        )
    yield (
        f'<div class="card"><span>greedy tokens that agree</span><b>{agreed} / {total}</b>'
        f"<small>{len(report.greedy)} free-running texts</small></div>"
    )


def _facts(report: ParityReport) -> list[tuple[str, str]]:
    subject = report.subject
    model = f"{subject.layers} layers, {subject.heads} heads, width {subject.width}, vocabulary {subject.vocab_size:,}"
    facts = [
        ("Model", model),
        ("dtype", subject.dtype),
        ("Lowering", subject.lowering or "none"),
        ("Prompt logits", "all positions" if subject.logits == "all" else "last position"),
        ("Runtime", f"{subject.runtime} on {subject.device}"),
        ("Reference", report.reference),
        ("Seed", str(report.seed)),
        ("Measured", f"{report.created[:16].replace('T', ' ')} UTC, in {report.seconds:.1f} s"),
    ]
    return [*facts, *((f"Version of {name}", version) for name, version in report.versions.items())]


def _check_rows(report: ParityReport) -> Iterable[str]:
    for check in report.checks:
        verdict = '<span class="ok">pass</span>' if check.passed else '<span class="no">FAIL</span>'
        yield (
            f'<tr><td class="wide">{escape(check.claim)}</td><td>{number(check.measured)}</td>'
            f"<td>{number(check.limit)}</td><td>{check.compared}</td><td>{verdict}</td></tr>"
        )


def _greedy_rows(report: ParityReport) -> Iterable[str]:
    for item in report.greedy:
        cells = (item.case, str(item.row), f"{item.agreed} of {item.tokens}", number(item.gap), number(item.tie))
        yield _row(*cells) if item.explained else _row(*cells).replace("<tr>", '<tr class="no">')


def _stage_rows(report: ParityReport) -> Iterable[str]:
    for row in stage_rows(report):
        yield (
            f'<tr><td>{escape(row.case)}</td><td class="left">{escape(row.stage)}</td><td>{row.positions}</td>'
            f"<td>{number(row.max_abs)}</td><td>{number(row.relative)}</td><td>{number(row.kl)}</td>"
            f"<td>{row.same_top} of {row.positions}</td><td>{number(row.state)}</td></tr>"
        )


def _describe_cases(report: ParityReport) -> str:
    return " ".join(
        f"{case.name}: {case.description}, prompts of {_join(case.lengths)} tokens (pieces of {case.piece}), then "
        f"{case.decoded} tokens one by one."
        for case in report.cases
    )


def _yardstick_section(report: ParityReport) -> str:
    if not report.yardsticks:
        return ""
    rows = "\n".join(
        _row(stick.quantity, number(stick.candidate), number(stick.reference)) for stick in report.yardsticks
    )
    return (
        "<section><h2>Beside float32</h2>"
        f'<p class="note">Root mean square of all relative errors against the eager model in float32. '
        f"The eager model in {escape(report.subject.dtype)} pays for its dtype as well; a correct runtime pays about "
        "the same.</p>"
        '<div class="scroll"><table><tr><th>of</th><th>runtime</th><th>eager model</th></tr>'
        f"{rows}</table></div></section>"
    )


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _join(lengths: tuple[int, ...]) -> str:
    words = [str(length) for length in lengths]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
