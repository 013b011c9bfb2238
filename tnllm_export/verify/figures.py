"""The plots of a report as SVG text, to be put into a page."""
# ruff: noqa: PLC0415 - matplotlib is imported when there is something to plot

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tnllm_export.verify.judge import STAGE_WORDS
from tnllm_export.verify.records import STAGES, LogitsDifference, ParityReport, worst
from tnllm_export.verify.tolerances import tolerance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"prefill": "#1f5fa8", "pieces": "#d97706", "decode": "#0f8a6d"}
LIMIT_COLOUR = "#b91c1c"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tnllm",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "text.color": "#0f172a",
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_MARKERS = {"prefill": "D", "pieces": "s", "decode": "o"}
# Where points coincide the smaller one shows inside the larger, hollow one.
_SIZES = {"prefill": 7.5, "pieces": 5.0, "decode": 3.2}


def error_by_layer(report: ParityReport) -> str:
    """Plot the relative error of each layer's state, the worst of all cases, after each stage."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        # All measurements share one floor, so that equal heights mean equal errors.
        scale = _LogScale((item.relative for item in report.states), limit)
        for stage in STAGES:
            layers = sorted({item.layer for item in report.states if item.stage == stage})
            errors = [worst(s.relative for s in report.states if (s.stage, s.layer) == (stage, n)) for n in layers]
            if layers:
                axes.plot(
                    layers,
                    [scale.height(error) for error in errors],
                    color=COLOURS[stage],
                    marker=_MARKERS[stage],
                    markersize=_SIZES[stage],
                    markerfacecolor="none" if stage == "prefill" else COLOURS[stage],
                    linewidth=1.3,
                    label=STAGE_WORDS[stage],
                )
                _mark_infinite(axes, layers, errors, scale)
        scale.apply(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of the state")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    limit = tolerance(report.subject.dtype).state
    return _figure(draw, "relative error of each layer's state")


def error_by_position(report: ParityReport) -> str:
    """Plot the relative error of the logits over the position in the text."""
    limit = tolerance(report.subject.dtype).logits
    return _by_position(report, lambda item: item.relative, limit, "relative error of the logits")


def kl_by_position(report: ParityReport) -> str:
    """Plot the KL divergence over the position in the text."""
    limit = tolerance(report.subject.dtype).kl
    return _by_position(report, lambda item: item.kl, limit, "KL divergence (nats)")


def _by_position(report: ParityReport, measure: Callable[[LogitsDifference], float], limit: float, label: str) -> str:
    def draw(axes: "Axes") -> None:
        scale = _LogScale((measure(item) for item in report.logits), limit)
        for stage in STAGES:
            items = [item for item in report.logits if item.stage == stage]
            if items:
                positions = [item.position for item in items]
                values = [measure(item) for item in items]
                axes.scatter(
                    positions,
                    [scale.height(value) for value in values],
                    s=_SIZES[stage] ** 2,
                    marker=_MARKERS[stage],
                    facecolors="none" if stage == "prefill" else COLOURS[stage],
                    edgecolors=COLOURS[stage],
                    linewidths=1 if stage == "prefill" else 0,
                    label=STAGE_WORDS[stage],
                )
                _mark_infinite(axes, positions, values, scale)
        scale.apply(axes)
        axes.set_xlabel("position in the text (tokens)")
        axes.set_ylabel(label)

    return _figure(draw, f"{label} by position")


class _LogScale:
    """A log axis that has a place for exact zeros, at its bottom, and for what is not finite, at its top."""

    def __init__(self, values: Iterable[float], limit: float) -> None:
        values = list(values)
        finite = [value for value in values if math.isfinite(value) and value > 0]
        low = math.floor(math.log10(min([*finite, limit])))
        high = math.ceil(math.log10(max([*finite, limit])) + 0.3)
        self.limit = limit
        self.zeros = 0.0 in values
        # Zeros get a decade of their own below the smallest error.
        self.bottom = 10.0 ** (low - 1 if self.zeros else low)
        self.top = 10.0**high

    def height(self, value: float) -> float:
        if not math.isfinite(value):
            return self.top
        return max(value, self.bottom)

    def apply(self, axes: "Axes") -> None:
        """Set the scale, draw the limit and put a "0" on the axis."""
        axes.set_yscale("log")
        axes.set_ylim(self.bottom / 1.6, self.top * 1.3)
        axes.axhline(self.limit, color=LIMIT_COLOUR, linestyle="--", linewidth=1.2, label="limit")
        low, high = round(math.log10(self.bottom)), round(math.log10(self.top))
        step = max(1, math.ceil((high - low) / 7))
        first = low + 1 if self.zeros else low
        powers = range(first, high + 1, step)
        ticks = [10.0**power for power in powers]
        labels = [f"1e{power}" for power in powers]
        if self.zeros:
            ticks, labels = [self.bottom, *ticks], ["0 (equal)", *labels]
        axes.set_yticks(ticks, labels)
        axes.minorticks_off()


def _mark_infinite(axes: "Axes", places: Sequence[int], values: Sequence[float], scale: _LogScale) -> None:
    """Say where a value is NaN or infinite instead of leaving a hole."""
    bad = [place for place, value in zip(places, values, strict=True) if not math.isfinite(value)]
    if bad:
        axes.scatter(bad, [scale.top] * len(bad), marker="x", s=45, color=LIMIT_COLOUR, zorder=5)
        axes.annotate(
            "not finite", (bad[0], scale.top), color=LIMIT_COLOUR, fontsize=9, xytext=(6, 5), textcoords="offset points"
        )


def _figure(draw: Callable[["Axes"], None], label: str) -> str:
    """Draw one plot and return it as an `<svg>` element that refers to nothing outside of it."""
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
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, handlelength=1.4, columnspacing=1.1
        )
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return inline_svg(buffer.getvalue(), label)


def inline_svg(svg: str, label: str) -> str:
    """Make matplotlib's document an inline element: no addresses, no fonts of its own, any width, a spoken label."""
    svg = svg[svg.index("<svg") :]
    # Inside HTML the namespaces are implied.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # Ids that only name groups are the same in every figure of a page.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}"', svg, count=1)
