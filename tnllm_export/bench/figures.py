"""The plots of a bench report as SVG text, to be put into a page that is light or dark."""
# ruff: noqa: PLC0415 - matplotlib is imported when there is something to plot

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tnllm_export.bench.digest import Section, sections
from tnllm_export.bench.records import BenchReport, Row
from tnllm_export.verify.figures import inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn in stand-ins, which become the page's own colours.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_SERIES = ("#040404", "#050505", "#060606", "#070707", "#080808")
_FLOOR = "#090909"
_VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _LINE: "--line",
    _FLOOR: "--floor",
    **{colour: f"--series-{index}" for index, colour in enumerate(_SERIES, start=1)},
}
_MARKERS = ("o", "s", "^", "D", "v")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tnllm",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def plots(report: BenchReport) -> list[tuple[str, str, str]]:
    """Return title, note and SVG of each plot."""
    prompt, context, batch, made = sections(report)
    return [
        (prompt.title, prompt.note, _times(report, prompt, "seconds to the first token", 1.0)),
        (context.title, context.note, _times(report, context, "milliseconds per token", 1e3)),
        (batch.title, batch.note, _times(report, batch, "milliseconds per step", 1e3)),
        (
            made.title,
            "Tokens per second of all sequences together.",
            _over(
                report, made, "tokens per second", lambda row: row.tokens_per_second, lambda row: row.batch / row.floor
            ),
        ),
        (
            "Peak memory over prompt length",
            "Above what was in use before the runtime was loaded.",
            _over(report, prompt, "gigabytes", lambda row: _scaled(row.memory), None),
        ),
        (
            "Peak memory over batch",
            "While decoding.",
            _over(report, batch, "gigabytes", lambda row: _scaled(row.memory), None),
        ),
    ]


def _times(report: BenchReport, section: Section, label: str, scale: float) -> str:
    """Plot medians with their spread, and the floor."""
    return _over(
        report,
        section,
        label,
        lambda row: None if row.times is None else scale * row.times.median,
        lambda row: scale * row.floor,
        lambda row: None if row.times is None else (scale * row.times.p10, scale * row.times.p90),
    )


def _over(
    report: BenchReport,
    section: Section,
    label: str,
    value: Callable[[Row], float | None],
    floor: Callable[[Row], float] | None,
    spread: Callable[[Row], tuple[float, float] | None] | None = None,
) -> str:
    def draw(axes: "Axes") -> None:
        sizes = [section.size(case) for case in section.cases]
        for index, result in enumerate(report.timed):
            points = [(size, y, row) for size, row in section.rows(result) if (y := value(row)) is not None]
            colour = _SERIES[index % len(_SERIES)]
            if not points:
                continue
            xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
            marker = _MARKERS[index % len(_MARKERS)]
            axes.plot(xs, ys, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=result.runtime)
            bands = [(x, band) for x, _, row in points if spread is not None and (band := spread(row)) is not None]
            for x, (low, high) in bands:
                axes.vlines(x, low, high, color=colour, linewidth=3, alpha=0.35)
        if floor is not None and report.timed:
            rows = section.rows(report.timed[0])
            xs, ys = [x for x, _ in rows], [floor(row) for _, row in rows]
            axes.plot(xs, ys, color=_FLOOR, linestyle="--", linewidth=1.3, label="roofline")
        _scale(axes, sizes, log_y=floor is not None)
        axes.set_xlabel(section.axis)
        axes.set_ylabel(label)

    return _figure(draw, f"{section.title}: {label}")


def _scale(axes: "Axes", sizes: Sequence[int], *, log_y: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(sizes)), [f"{size:,}" for size in sorted(set(sizes))])
    axes.set_xlim(min(sizes) / 1.3, max(sizes) * 1.3)
    axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)


def _figure(draw: Callable[["Axes"], None], label: str) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        # No pyplot: a user's own figures and backend stay as they are.
        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        draw(axes)
        handles, names = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, names, loc="outside upper left", ncols=4, handlelength=1.6, columnspacing=1.1)
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = inline_svg(buffer.getvalue(), label)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _scaled(size: int | None) -> float | None:
    return None if size is None else size / 1e9
