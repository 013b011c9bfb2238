"""The figures that both the terminal and the page show, in words."""

from dataclasses import dataclass

from tnllm_export.bench.records import BenchReport, Program, Row, RuntimeResult


@dataclass(frozen=True)
class Section:
    """One sweep: the same cases on every runtime.

    Attributes:
        title: What is measured.
        note: What the reader must know.
        axis: What the cases differ in.
        program: Which program runs.
        cases: (batch, tokens) of each case, in order.
    """

    title: str
    note: str
    axis: str
    program: Program
    cases: tuple[tuple[int, int], ...]

    def size(self, case: tuple[int, int]) -> int:
        """Return what a case has on the axis."""
        batch, tokens = case
        return batch if self.axis == "sequences" else tokens

    def rows(self, result: RuntimeResult) -> list[tuple[int, Row]]:
        """Return the rows of a runtime with their place on the axis."""
        found = ((self.size(case), result.row(self.program, *case)) for case in self.cases)
        return [(size, row) for size, row in found if row is not None]


def sections(report: BenchReport) -> tuple[Section, Section, Section, Section]:
    """Return the sweeps of a report."""
    lengths, contexts, batches = (tuple(report.options[name]) for name in ("prompt_lengths", "contexts", "batches"))
    return (
        Section(
            "Time to the first token",
            "One prompt, fed in one call, and the choice of its first token.",
            "prompt tokens",
            "prefill",
            tuple((1, tokens) for tokens in lengths),
        ),
        Section(
            "Decode over context",
            "One sequence: one token and the choice of the next, each waited for. " + fed_note(report),
            "tokens before",
            "decode",
            tuple((1, context) for context in contexts),
        ),
        Section(
            "Decode over batch",
            f"Sequences decoded together, after {contexts[0]:,} tokens each.",
            "sequences",
            "decode",
            tuple((batch, contexts[0]) for batch in batches),
        ),
        Section(
            "Generation over batch",
            f"What a reader of the stream waits for each greedy token, after {contexts[0]:,} tokens. A runtime that "
            "runs ahead starts each step before the host has seen the token it feeds.",
            "sequences",
            "generate",
            tuple((batch, contexts[0]) for batch in batches),
        ),
    )


def fed_note(report: BenchReport) -> str:
    """Say which contexts were fed in full."""
    rows = [row for result in report.timed for row in result.rows if row.program == "decode" and row.times]
    short = sorted({row.tokens for row in rows if row.fed < row.tokens})
    if not short:
        return "All tokens of a context were fed before."
    fed = max(row.fed for row in rows if row.fed < row.tokens)
    return (
        f"Of contexts of {', '.join(f'{tokens:,}' for tokens in short)} tokens only {fed} were fed where more would "
        "have taken too long; the decoded tokens have the positions behind the whole context. The state has the same "
        "size either way."
    )


def constant_cost(report: BenchReport, result: RuntimeResult) -> str | None:
    """Say how much longer a token takes after the longest context than after the shortest one, or None."""
    contexts = sorted(report.options["contexts"])
    first, last = (result.row("decode", 1, context) for context in (contexts[0], contexts[-1]))
    if first is None or last is None or first is last or first.times is None or last.times is None:
        return None
    change = last.times.median / first.times.median - 1
    return f"{result.runtime}: after {last.tokens:,} tokens {change:+.1%} against after {first.tokens:,}"


def best(report: BenchReport, program: Program, batch: int, tokens: int) -> tuple[RuntimeResult, Row] | None:
    """Return the quickest runtime of a case, or None."""
    found = [
        (result, row)
        for result in report.timed
        if (row := result.row(program, batch, tokens)) is not None and row.times
    ]
    return min(found, key=lambda pair: pair[1].times.median if pair[1].times else 0.0, default=None)


def cells(row: Row) -> tuple[str, str, str, str, str, str]:
    """Return median, spread, tokens per second, floor, share of the roofline and memory."""
    if row.times is None:
        return ("–", "–", "–", milliseconds(row.floor), "–", "–")
    return (
        milliseconds(row.times.median),
        f"{milliseconds(row.times.p10)} – {milliseconds(row.times.p90)}",
        f"{row.tokens_per_second:,.0f}" if (row.tokens_per_second or 0) >= 10 else f"{row.tokens_per_second:.2f}",
        milliseconds(row.floor),
        percent(row.of_roofline),
        gigabytes(row.memory),
    )


COLUMNS = ("median, ms", "p10 – p90", "tokens/s", "floor, ms", "of roofline", "peak memory")


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three digits or so."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent(share: float | None) -> str:
    """Return a share as people read it."""
    return "–" if share is None else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def gigabytes(size: int | None) -> str:
    """Return a number of bytes as people read it."""
    if size is None:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def ceilings_in_words(report: BenchReport) -> str:
    """Say what the device does, as measured."""
    found = report.ceilings
    bandwidth = f"{found.bandwidth / 1e12:.2f} TB/s" if found.bandwidth >= 1e12 else f"{found.bandwidth / 1e9:.1f} GB/s"
    rate = f"{found.matmul / 1e12:.1f} TFLOP/s" if found.matmul >= 1e12 else f"{found.matmul / 1e9:.1f} GFLOP/s"
    return f"copies {bandwidth} (read plus written), multiplies {rate} in {found.dtype}"


def model_in_words(report: BenchReport) -> str:
    """Say what the model is."""
    model = report.model
    return (
        f"{model['layers']} layers, {model['heads']} heads, width {model['width']:,}, vocabulary "
        f"{model['vocabulary']:,}, {model['parameters'] / 1e6:,.1f} M parameters"
    )
