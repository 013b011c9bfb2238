"""What the tables of the documentation are made of."""

from collections.abc import Callable, Iterable

from benchmarks.records import Record

Table = Callable[[list[Record]], str]


def rows(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def by_case(records: list[Record]) -> dict[str, list[Record]]:
    """Records of one case together, in the order in which cases come."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record.case, []).append(record)
    return cases


def peer_name(record: Record) -> str:
    """The peer without the reason why it is absent."""
    return (record.peer or "").partition(" (absent")[0]


def peer_values(records: list[Record]) -> dict[str, float | None]:
    """Values of one case's peers, None for those that are absent."""
    return {peer_name(record): record.peer_value for record in records if record.peer}


def figure(value: float | None, spec: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, spec)


def share(part: float | None, whole: float | None, spec: str = ".2f") -> str:
    """A ratio, or a dash."""
    return figure(part / whole if part is not None and whole else None, spec)


def absences(records: list[Record]) -> str:
    """One line for each reason why a number is missing."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record.peer and " (absent: " in record.peer:
            reasons.setdefault(record.peer, []).append(record.case)
    lines = [f"- {peer.replace(' (absent: ', ': ')[:-1]} ({'; '.join(dict.fromkeys(cases))})"
             for peer, cases in reasons.items()]  # fmt: skip
    return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""
