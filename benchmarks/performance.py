"""Tables of `docs/performance.md`: ours beside every peer and the floor."""

from collections.abc import Iterable

from benchmarks import names
from benchmarks.performance_inference import (
    attention_table,
    context_table,
    distance_table,
    inference_table,
    short_inference_table,
)
from benchmarks.performance_onnxruntime import beside_table, lowerings_table
from benchmarks.performance_onnxruntime import distance_table as onnxruntime_distance_table
from benchmarks.records import Record
from benchmarks.tables import Table, absences, by_case, figure, peer_name, peer_values, rows, share

DTYPES = ("float32", "float16", "bfloat16")

LINEAR_PEERS = ("fla chunk", "fla fused", "lightning-attn", "fla recurrent")
"""Who computes the same function."""


def best(values: dict[str, float | None], among: Iterable[str]) -> float | None:
    """The smallest value of these peers."""
    return min((values[name] for name in among if values.get(name) is not None), default=None)  # type: ignore[type-var]


def time_table(records: list[Record]) -> str:
    """Times of one piece of work over shapes, launched normally and in a graph."""
    peers = list(dict.fromkeys(peer_name(record) for record in records))
    peers = [name for name in peers if name != names.OURS]
    lines = []
    for case, found in by_case(records).items():
        ours, floor, values = found[0].value, found[0].floor, peer_values(found)
        shape, how = case.split(" | ")
        rival = best(values, LINEAR_PEERS)
        lines.append(
            [shape, how, figure(floor), figure(ours), *(figure(values.get(peer)) for peer in peers),
             share(ours, rival), _target(found[0].name, shape, how), share(floor, ours)]
        )  # fmt: skip
    unit = records[0].unit
    header = ["B, H, T", "how", f"floor ({unit})", "**ours**", *peers, "of best linear peer", "target", "floor / ours"]
    return rows(header, lines) + absences(records)


def short_table(records: list[Record]) -> str:
    """The work in a graph, or launched where a peer was not captured: ours, the best linear peer, the floor."""
    shapes: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        shape, how = record.case.split(" | ")
        shapes.setdefault(shape, {}).setdefault(how, []).append(record)
    lines = []
    for shape, ways in shapes.items():
        found = max((ways[how] for how in (names.GRAPH, names.LAUNCHED) if how in ways), key=_measured_rivals)
        values = peer_values(found)
        rival = best(values, LINEAR_PEERS)
        name = next((peer for peer in LINEAR_PEERS if rival is not None and values.get(peer) == rival), "")
        lines.append(
            [shape, figure(found[0].value), f"{figure(rival)} ({name})", share(found[0].value, rival),
             figure(found[0].floor), share(found[0].floor, found[0].value)]
        )  # fmt: skip
    unit = records[0].unit
    header = ["B, H, T", f"ours ({unit})", "best linear-attention peer", "ours / peer", "floor", "floor / ours"]
    return rows(header, lines)


def _measured_rivals(records: list[Record]) -> int:
    values = peer_values(records)
    return sum(values.get(peer) is not None for peer in LINEAR_PEERS)


def parity_table(records: list[Record]) -> str:
    """Errors against float64: the worst over shapes and layers, by dtype and quantity."""
    peers = [name for name in dict.fromkeys(peer_name(record) for record in records) if name != names.OURS]
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        parts = record.case.split(" | ")
        dtype = next((part for part in parts if part in DTYPES), "")
        groups.setdefault((dtype, parts[-1]), []).append(record)
    lines = []
    for (dtype, quantity), found in groups.items():
        ours = [record.value for record in found if record.value is not None]
        values = {peer: worst(record.peer_value for record in found if peer_name(record) == peer) for peer in peers}
        ratios = (
            record.value / record.peer_value
            for record in found
            if record.value is not None and record.peer_value and peer_name(record) in (names.BLOCKED, names.PYTORCH)
        )
        lines.append(
            [dtype, quantity, str(len({record.case for record in found})), figure(found[0].floor, ".0e"),
             figure(worst(ours), ".2e"), *(figure(values[peer], ".2e") for peer in peers), figure(worst(ratios), ".2f")]
        )  # fmt: skip
    header = ["dtype", "of", "cases", "limit", "**ours**", *peers, "ours of the PyTorch form's, at most"]
    return rows(header, lines) + absences(records)


def worst(values: Iterable[float | None]) -> float | None:
    """The largest of the values that there are."""
    return max((value for value in values if value is not None), default=None)


def profile_table(records: list[Record]) -> str:
    """What a profiler counted, one column per shape."""
    cases = by_case(records)
    metrics = list(dict.fromkeys((record.metric, record.unit) for record in records))
    lines = []
    for metric, unit in metrics:
        found = ({record.metric: record.value for record in case}.get(metric) for case in cases.values())
        lines.append([metric, unit, *(figure(value, ".4g") for value in found)])
    return rows(["what", "unit", *cases], lines)


def memory_table(records: list[Record]) -> str:
    """Peak memory of forward and backward."""
    peers = [name for name in dict.fromkeys(peer_name(record) for record in records) if name != names.OURS]
    lines = []
    for case, found in by_case(records).items():
        values = peer_values(found)
        lines.append(
            [case, figure(found[0].value), *(figure(values.get(peer)) for peer in peers),
             share(found[0].value, best(values, LINEAR_PEERS))]
        )  # fmt: skip
    header = ["B, H, T", f"**ours** ({records[0].unit})", *peers, "of best linear peer"]
    return rows(header, lines) + absences(records)


def chip_table(records: list[Record]) -> str:
    """Ceilings of the chip."""
    return rows(
        ["what", "measured"], [[record.case, f"{figure(record.value, '.2f')} {record.unit}"] for record in records]
    )


def training_table(records: list[Record]) -> str:
    """Speed, memory and utilisation over contexts, by model."""
    values, contexts = training_values(records)
    models = list(dict.fromkeys(model for model, _, _ in values))
    metrics = list(dict.fromkeys(record.metric for record in records))
    lines = []
    for metric in metrics:
        for model in models:
            found = [values.get((model, metric, context)) for context in contexts]
            spec = ".0f" if metric == "tokens per second" else ".1f" if "memory" in metric else ".3f"
            cells = [figure(value, spec) for value in found]
            spread = ""
            known = [value for value in found if value is not None]
            if metric == "tokens per second" and len(known) > 1:
                spread = f"{max(known) / min(known) - 1:.1%}"
            lines.append([metric, f"**{model}**" if model == names.OURS else model, *cells, spread])
    header = ["what", "model", *(f"{context:,} tokens" for context in contexts), "fastest over slowest"]
    return rows(header, lines) + absences(records)


def training_values(records: list[Record]) -> tuple[dict[tuple[str, str, int], float | None], list[int]]:
    """Values by model, metric and context; the contexts."""
    values: dict[tuple[str, str, int], float | None] = {}
    for record in records:
        context = int(record.case.partition(" | ")[0])
        if record.peer is None or record.value is not None:
            values[names.OURS, record.metric, context] = record.value
        if record.peer:
            values[peer_name(record), record.metric, context] = record.peer_value
    return values, sorted({context for _, _, context in values})


def comparison_table(records: list[Record]) -> str:
    """Any comparison: case, metric, ours, the peer, the floor."""
    lines = [
        [record.case.replace(" | ", ", "), record.metric, _measured(record, record.value) + _unit(record),
         _measured(record, record.floor), share(record.floor, record.value), peer_name(record),
         _measured(record, record.peer_value), share(record.value, record.peer_value)]
        for record in records
    ]  # fmt: skip
    header = ["case", "what", "**ours**", "floor", "floor / ours", "peer", "its value", "ours / peer"]
    return rows(header, lines) + absences(records)


def _measured(record: Record, value: float | None) -> str:
    """A figure; where there is no unit it is an error, which may be small."""
    return figure(value, ".1e" if record.unit == "1" else ".3f")


def _unit(record: Record) -> str:
    return "" if record.unit == "1" else f" {record.unit}"


def plugin_table(records: list[Record]) -> str:
    """The plugin beside the same kernels launched by Triton."""
    lines = [
        [*record.case.split(" | "), figure(record.value, ".2f"), figure(record.peer_value, ".2f"),
         share(record.value, record.peer_value, ".3f"), figure(record.floor, ".2f")]
        for record in records
    ]  # fmt: skip
    return rows(["B, H, T", "dtype", "**plugin** (µs)", "Triton (µs)", "plugin / Triton", "floor (µs)"], lines)


def _target(name: str, shape: str, how: str) -> str:
    tokens = int(shape.split(", ")[2])
    if name == names.FORWARD:
        limit = 0.6 if tokens >= 16384 or how == names.GRAPH else 0.5
        return f"at most {limit}"
    if name == names.BACKWARD:
        return "at most 0.5" if tokens >= 4096 else ""
    if name == names.DECODE and how == names.GRAPH:
        batch = int(shape.split(", ", maxsplit=1)[0])
        return {1: "at most 3 µs", 8: "at most 10 µs"}.get(batch, "floor / ours at least 0.85")
    return ""


TABLES: dict[str, Table] = {
    names.CHIP: chip_table,
    names.PARITY: parity_table,
    names.FORWARD: time_table,
    names.BACKWARD: time_table,
    names.MEMORY: memory_table,
    names.DECODE_PARITY: parity_table,
    names.DECODE: time_table,
    names.TRAINING_PARITY: comparison_table,
    names.TRAINING: training_table,
    names.LAYER: comparison_table,
    names.PROFILE: profile_table,
    names.INFERENCE_PARITY: distance_table,
    names.INFERENCE: inference_table,
    names.INFERENCE_CONTEXT: context_table,
    names.INFERENCE_ATTENTION: attention_table,
    names.ORT_PARITY: onnxruntime_distance_table,
    names.ORT_INFERENCE: beside_table,
}
"""By name of the records; `<!-- begin NAME -->` marks the place in the page."""

PLUGIN_TABLES: dict[str, Table] = {names.PLUGIN: plugin_table}
"""What the page on TensorRT shows."""

ONNXRUNTIME_TABLES: dict[str, Table] = {names.ORT_LOWERINGS: lowerings_table}
"""What the page on ONNX Runtime shows."""

SHORT_TABLES: dict[str, Table] = {
    names.FORWARD: short_table,
    names.DECODE: short_table,
    names.INFERENCE: short_inference_table,
}
"""What the README shows of them."""

PICTURES = {
    names.BACKWARD: "![Time over T of every form and the floor](images/attention_time.svg)",
    names.MEMORY: "![Peak memory over T of every form](images/attention_memory.svg)",
    names.TRAINING: "![Tokens per second over context of the three models](images/training.svg)",
    names.INFERENCE_CONTEXT: "![Time per token and memory over context, ours and a Transformer](images/inference.svg)",
}
"""Plots that stand below a table; `performance_plots` draws them."""
