"""Tables of inference in `docs/performance.md`: time per token, prefill and memory, and both over context."""

from benchmarks import names
from benchmarks.records import Record
from benchmarks.tables import absences, figure, peer_name, rows, share

TARGETS = {
    ("7B | decode, B 1, ", "time per token"): "floor / ours at least 0.85",
    ("7B | decode, B 32, ", "time per token"): "floor / ours at least 0.75",
    ("1B | decode, B 1, generation", "time per token"): "floor / ours at least 0.75",
    ("7B | decode at ", "time per token"): "ours / that at 1024 at most 1.02",
    ("7B | prefill ", "time"): "floor / ours at least 0.60",
    ("7B | decode, B 1", "peak memory"): "at most the limit",
}
"""By how a case begins and by metric; the first that fits."""


def inference_table(records: list[Record]) -> str:
    """Decode, prefill, first token and memory of each size beside the floor (for memory: the limit) and the peers."""
    lines = []
    for (case, metric), found in _grouped(records).items():
        first = found[0]
        # A rate is better the higher it is.
        best = share(first.value, first.floor) if metric == "rate" else share(first.floor, first.value)
        peers = "; ".join(
            f"{peer_name(record)} {figure(record.peer_value)} ({share(record.value, record.peer_value)})"
            for record in found
            if record.peer_value is not None
        )
        value = f"{figure(first.value)} {first.unit}"
        lines.append([*case.split(" | "), metric, value, figure(first.floor), best, _target(first), peers])
    header = ["size", "case", "what", "**ours**", "floor or limit", "floor / ours", "target", "peers (ours / peer)"]
    return rows(header, lines) + absences(records)


def short_inference_table(records: list[Record]) -> str:
    """What the README shows: a token of a generation and of a loop of calls, and a long prefill, beside PyTorch's."""
    lines = []
    for (case, metric), found in _grouped(records).items():
        size, what = case.split(" | ")
        decoded = metric == "time per token" and what.startswith("decode, ") and not what.endswith("graph only")
        if decoded or (metric == "time" and what.startswith("prefill ")):
            peers = {peer_name(record): record.peer_value for record in found}
            first = found[0]
            cells = [figure(first.value), figure(first.floor), share(first.floor, first.value)]
            lines.append(
                [size, what.removesuffix(", host included"), *cells, *(figure(peers.get(n)) for n in SHORT_PEERS)]
            )
    return rows(["size", "what", "ours (ms)", "floor", "floor / ours", *SHORT_PEERS], lines)


SHORT_PEERS = ("torch.compile, reduce-overhead", "PyTorch")


def _grouped(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records that were measured, by case and metric, sizes as they came."""
    known = [record for record in records if record.value is not None or record.peer_value is not None]
    known.sort(key=lambda record: (_size_place(records, record), record.case, record.metric))
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in known:
        groups.setdefault((record.case, record.metric), []).append(record)
    return groups


def distance_table(records: list[Record]) -> str:
    """Distance from float32, ours of plain PyTorch's."""
    lines = [
        [*record.case.split(" | "), figure(record.value, ".2e"), figure(record.peer_value, ".2e"),
         share(record.value, record.peer_value)]
        for record in records
    ]  # fmt: skip
    return rows(["model", "logits", "**ours**", "PyTorch", "ours / PyTorch, at most 1.2"], lines) + absences(records)


def context_table(records: list[Record]) -> str:
    """Time and memory over context, ours and the Transformer's, by size."""
    values = context_values(records)
    contexts = sorted({context for _, _, _, context in values})
    units = {record.metric: record.unit for record in records}
    lines = []
    for size, metric, model in dict.fromkeys(key[:3] for key in values):
        found = [values.get((size, metric, model, context)) for context in contexts]
        known = [value for value in found if value is not None]
        growth = share(known[-1], known[0], ".3f") if len(known) > 1 else ""
        name = f"**{model}**" if model == names.OURS else model
        lines.append([size, f"{metric} ({units[metric]})", name, *map(figure, found), growth])
    header = ["size", "what", "model", *(f"{context:,} tokens" for context in contexts), "last / first"]
    return rows(header, lines) + absences(records)


def context_values(records: list[Record]) -> dict[tuple[str, str, str, int], float | None]:
    """Values by size, metric, model and context: of one size and metric together, ours first."""
    values: dict[tuple[str, str, str, int], float | None] = {}
    sizes = dict.fromkeys(record.case.split(" | ")[0] for record in records)
    for size in sizes:
        for metric in dict.fromkeys(record.metric for record in records):
            chosen = [r for r in records if r.metric == metric and r.case.startswith(f"{size} | ")]
            for mine in (True, False):
                for record in chosen:
                    context = int(record.case.split(" | ")[1])
                    model, value = (names.OURS, record.value) if mine else (peer_name(record), record.peer_value)
                    values[size, metric, model, context] = value
    return values


def attention_table(records: list[Record]) -> str:
    """One layer's attention of the Transformer over context, by form: the quickest is the one that it decodes with."""
    forms = list(dict.fromkeys(peer_name(record) for record in records))
    cases = dict.fromkeys(record.case for record in records)
    lines = []
    for case in cases:
        found = {peer_name(record): record.peer_value for record in records if record.case == case}
        floor = next(record.floor for record in records if record.case == case)
        known = [value for value in found.values() if value is not None]
        cells = [figure(found.get(form), ".1f") for form in forms]
        lines.append([*case.split(" | "), figure(floor, ".1f"), *cells, share(floor, min(known, default=None))])
    header = ["size", "context", f"floor ({records[0].unit})", *forms, "floor / quickest"]
    return rows(header, lines) + absences(records)


def _size_place(records: list[Record], record: Record) -> int:
    sizes = list(dict.fromkeys(other.case.split(" | ")[0] for other in records))
    return sizes.index(record.case.split(" | ")[0])


def _target(record: Record) -> str:
    fits = (
        target
        for (start, metric), target in TARGETS.items()
        if record.metric == metric and record.case.startswith(start)
    )
    return next(fits, "")
