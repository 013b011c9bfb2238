"""Tables and plots of the documentation, made from the results files: nothing in them is written by hand."""

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import constant_cost, drift, engines, performance, performance_plots, scale
from benchmarks.records import RESULTS, ROOT, Record, load
from benchmarks.tables import Table, by_case, rows


def write(root: Path = ROOT, results: Path = RESULTS) -> None:
    """Rewrite what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in the pages, and the plots.

    Args:
        root: Where the README and `docs` are.
        results: Where the results files are.
    """
    devices = {path.stem: load(path) for path in sorted(results.glob("*.json"))}
    for page, tables in PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        for device, records in devices.items():
            for name, table in tables.items():
                chosen = [record for record in records if record.name == name]
                if chosen:
                    parts = (table(chosen), performance.PICTURES.get(name), _source(device, chosen))
                    text = _replace(text, name, "\n\n".join(part for part in parts if part), page)
        (root / page).write_text(text, encoding="utf-8")
    for records in devices.values():
        drifts = [record for record in records if record.name == drift.NAME]
        if drifts:
            _plot_drift(drifts, root / "docs" / "images" / "drift.svg")
        performance_plots.plot(records, root / "docs" / "images")


def _replace(text: str, name: str, content: str, page: str) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no place for {name}: expected {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def _source(device: str, records: list[Record]) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in records[0].versions.items())
    return f"Measured on {device}, commit {records[0].commit}, {tools}."


def _drift_table(records: list[Record]) -> str:
    cells = {tuple(record.case.split(" | ")): record.value for record in records}
    heads = list(dict.fromkeys(head for _, _, head, _ in cells))
    lines = [
        [activations.removesuffix(" activations"), form]
        + [f"{cells[activations, form, head, str(drift.TOKENS)]:.1e}" for head in heads]
        for activations, form in dict.fromkeys((activations, form) for activations, form, _, _ in cells)
    ]
    return rows(["activations", "form", *heads], lines)


def _cost_table(records: list[Record]) -> str:
    lines = [
        [record.metric, f"{record.value:.0f} {record.unit}", f"{record.peer_value:.0f} {record.unit}",
         f"{record.value / (record.peer_value or 1):.4f}"]
        for record in records
    ]  # fmt: skip
    return rows(["what", "value", constant_cost_peer(records), "ratio"], lines)


def constant_cost_peer(records: list[Record]) -> str:
    """The column that the values are compared with."""
    return str(records[0].peer)


def _scale_table(records: list[Record]) -> str:
    lines = []
    for record in records:
        if record.unit == "1":
            lines.append([record.case, record.metric, f"{record.value:.1e}", "", f"at most {record.floor:.0e}"])
            continue
        if record.peer_value:
            rest = f"{record.value / record.peer_value:.2f} times {record.peer} ({record.peer_value:.1f} s)"
            limit = f"at most {scale.TIME_LIMIT:.0f} times"
        else:
            rest, limit = "", f"at most {record.floor:.0f} {record.unit}"
        lines.append([record.case, record.metric, f"{record.value:.2f} {record.unit}", rest, limit])
    return rows(["checkpoint", "what", "value", "against", "limit"], lines)


def _engines_table(records: list[Record]) -> str:
    lines = []
    for case, found in by_case(records).items():
        size, weights = case.split(" | ")
        value = {record.metric: record.value or 0.0 for record in found}
        sizes = f"{value[engines.PREFILL]:.1f} MB and {value[engines.DECODE]:.1f} MB"
        costs = f"{value[engines.WALL]:.0f} s", f"{value[engines.PROCESSOR]:.0f} s", f"{value[engines.PEAK]:.1f} GiB"
        lines.append([size, f"`{weights}`", sizes, *costs])
    return rows(["model", "`--weights`", "engines", "time, both", "processor time", "peak memory"], lines)


def _plot_drift(records: list[Record], path: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "drift"  # the same results give the same file
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in records:
        activations, form, head, tokens = record.case.split(" | ")
        if activations.startswith("float32"):
            curves.setdefault((head, form), []).append((int(tokens), record.value))
    heads = list(dict.fromkeys(head for head, _ in curves))
    forms = list(dict.fromkeys(form for _, form in curves))
    figure, axes = plt.subplots(1, len(heads), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, head in zip(axes, heads, strict=True):
        for form, marker in zip(forms, "osv^d", strict=False):
            tokens, errors = zip(*curves[head, form], strict=True)
            axis.plot(tokens, errors, marker=marker, markersize=3, linewidth=1.2, label=form)
        axis.axhline(drift.LIMIT, color="0.5", linestyle=":", linewidth=1)
        axis.set(xscale="log", yscale="log", title=head, xlabel="decoded tokens")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error of the state")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(forms), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


PAGES: dict[str, dict[str, Table]] = {
    "docs/parity.md": {drift.NAME: _drift_table, constant_cost.NAME: _cost_table, scale.NAME: _scale_table},
    "docs/performance.md": performance.TABLES,
    "docs/onnxruntime.md": performance.ONNXRUNTIME_TABLES,
    "docs/tensorrt.md": {engines.NAME: _engines_table, **performance.PLUGIN_TABLES},
    "README.md": performance.SHORT_TABLES,
}
"""Each page and its tables, by name of the records."""
