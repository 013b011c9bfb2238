"""Tables of ONNX Runtime on CUDA: beside our own runtime, and by lowering."""

from benchmarks.inference_plan import PEAK
from benchmarks.records import Record
from benchmarks.tables import absences, figure, peer_name, rows, share


def beside_table(records: list[Record]) -> str:
    """Ours, the floor and ONNX Runtime, and how many times as long that takes."""
    lines = [
        [*record.case.split(" | "), record.metric, figure(record.floor), figure(record.value),
         figure(record.peer_value), share(record.peer_value, record.value, ".1f")]
        for record in records
        if record.value is not None
    ]  # fmt: skip
    header = ["size", "case", "what", "floor (ms)", "**ours** (ms)", "ONNX Runtime CUDA (ms)", "times as long as ours"]
    return rows(header, lines) + absences(records)


def distance_table(records: list[Record]) -> str:
    """Distance from float32 of each runtime beside plain PyTorch's."""
    lines = [
        [*record.case.split(" | "), figure(record.value, ".2e"), figure(record.peer_value, ".2e"),
         share(record.value, record.peer_value)]
        for record in records
    ]  # fmt: skip
    return rows(["size", "runtime", "distance", peer_name(records[0]), "ratio"], lines)


def lowerings_table(records: list[Record]) -> str:
    """Times and memory by model, dtype and case, a column for each lowering; the quickest is bold."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    lowerings: dict[str, None] = {}
    for record in records:
        model, lowering, case = record.case.split(" | ")
        lowerings[lowering] = None
        if record.value is not None and record.unit != "1":
            what = "memory beside the weights" if record.metric == PEAK else record.metric
            found.setdefault((model, case, what, record.unit), {})[lowering] = record.value
    lines = []
    for (model, case, what, unit), values in found.items():
        best = min(values.values())
        cells = [_cell(values.get(lowering), best) for lowering in lowerings]
        lines.append([model, case, f"{what} ({unit})", *cells])
    return rows(["model", "case", "what", *(f"`{name}`" for name in lowerings)], lines) + absences(records)


def _cell(value: float | None, best: float) -> str:
    text = figure(value, ".2f")
    return f"**{text}**" if value == best else text
