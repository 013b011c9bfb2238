"""Plots of `docs/performance.md`: time and memory over T, training speed over context."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import names
from benchmarks.performance import training_values
from benchmarks.performance_inference import context_values
from benchmarks.records import Record
from benchmarks.tables import by_case, peer_values

TIME, MEMORY, TRAINING = "attention_time.svg", "attention_memory.svg", "training.svg"
INFERENCE = "inference.svg"

_COLOURS = {
    names.OURS: "C3", names.FLA_CHUNK: "C0", names.FLA_FUSED: "C9", names.LIGHTNING: "C2", names.SDPA: "C1",
    names.BLOCKED: "0.6",
}  # fmt: skip

Series = dict[str, list[tuple[int, float]]]


def plot(records: list[Record], folder: Path) -> None:
    """Write the plots for which there are records."""
    mpl.rcParams["svg.hashsalt"] = "performance"  # the same results give the same file
    chosen: dict[str, list[Record]] = {}
    for record in records:
        chosen.setdefault(record.name, []).append(record)
    if names.FORWARD in chosen and names.BACKWARD in chosen:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for axis, name in zip(axes, (names.FORWARD, names.BACKWARD), strict=True):
            _draw(axis, over_tokens(chosen[name], names.LAUNCHED), "milliseconds", name)
        _finish(figure, axes[0], folder / TIME)
    if names.MEMORY in chosen:
        figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
        _draw(axis, over_tokens(chosen[names.MEMORY]), "GiB", "peak memory of forward and backward")
        _finish(figure, axis, folder / MEMORY)
    if names.TRAINING in chosen:
        figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
        values, _ = training_values(chosen[names.TRAINING])
        series: Series = {}
        for (model, metric, context), value in values.items():
            if metric == "tokens per second" and value is not None:
                series.setdefault(model, []).append((context, value))
        _draw(axis, series, "tokens per second", "training step, 385M", "context")
        axis.set_yscale("linear")
        axis.set_ylim(bottom=0)
        _finish(figure, axis, folder / TRAINING)
    if names.INFERENCE_CONTEXT in chosen:
        _plot_context(chosen[names.INFERENCE_CONTEXT], folder / INFERENCE)


def over_tokens(records: list[Record], how: str | None = None) -> Series:
    """Values over T of every form, and the floor, for one sequence with 32 heads and K = V."""
    series: Series = {}
    for case, found in by_case(records).items():
        shape, _, found_how = case.partition(" | ")
        batch, heads, tokens, *other = shape.split(", ")
        if (batch, heads) != ("1", "32") or other or (how is not None and found_how != how):
            continue
        values = {names.OURS: found[0].value, **peer_values(found), "floor": found[0].floor}
        for form, value in values.items():
            if value is not None:
                series.setdefault(form, []).append((int(tokens), value))
    return series


def _plot_context(records: list[Record], path: Path) -> None:
    """Time per token and memory over context: a colour for each model, a line style for each size."""
    values = context_values(records)
    units = {record.metric: record.unit for record in records}
    sizes = list(dict.fromkeys(size for size, *_ in values))
    figure, axes = plt.subplots(1, len(units), figsize=(11, 4.2), layout="constrained", squeeze=False)
    for axis, (metric, unit) in zip(axes[0], units.items(), strict=True):
        for size, found_metric, model in dict.fromkeys(key[:3] for key in values):
            points = [(key[3], value) for key, value in values.items() if key[:3] == (size, metric, model) and value]
            if found_metric == metric and points:
                xs, ys = zip(*sorted(points), strict=True)
                style, colour = "-" if size == sizes[0] else "--", "C3" if model == names.OURS else "C0"
                axis.plot(xs, ys, style, color=colour, marker="o", markersize=3.5, label=f"{size}, {model}")
        axis.set(yscale="log", title=metric, xlabel="context, tokens", ylabel=unit)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.25)
    _finish(figure, axes[0][0], path)


def _draw(axis: Axes, series: Series, unit: str, title: str, xlabel: str = "tokens, T") -> None:
    for form, points in series.items():
        xs, ys = zip(*sorted(points), strict=True)
        if form == "floor":
            axis.plot(xs, ys, color="black", linestyle=":", label="floor: bytes at copy bandwidth")
        else:
            width = 2.2 if form == names.OURS else 1.2
            axis.plot(xs, ys, color=_COLOURS.get(form), marker="o", markersize=3.5, linewidth=width, label=form)
    axis.set(yscale="log", title=title, xlabel=xlabel, ylabel=unit)
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.25)


def _finish(figure: Figure, axis: Axes, path: Path) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
