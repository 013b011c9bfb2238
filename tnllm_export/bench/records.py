"""What a bench report holds: frozen records that become JSON as they are."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tnllm_export.errors import ParityError, RuntimeTargetError

SCHEMA_VERSION = 1

Program = Literal["prefill", "decode", "generate"]


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured in this run.

    Attributes:
        bandwidth: Bytes per second of a large copy, read plus written.
        matmul: FLOP per second of a large matrix product in `dtype`.
        dtype: The bundle's; on the CPU float32, where that is quicker.
    """

    bandwidth: float
    matmul: float
    dtype: str


@dataclass(frozen=True)
class Times:
    """Seconds of single calls: median, 10th and 90th percentile, and how many calls."""

    median: float
    p10: float
    p90: float
    calls: int


@dataclass(frozen=True)
class Row:
    """One case on one runtime.

    Attributes:
        program: "prefill": a whole prompt and the choice of its first token. "decode": one token for each sequence, and
            the choice of the next, each waited for. "generate": the same as a reader of `Generator.stream` gets it.
        batch: Sequences.
        tokens: Of each prompt; otherwise those before the decoded ones.
        fed: Tokens that were really fed before decoding; fewer than `tokens` where those would have taken too long.
            The decoded ones have the positions from `tokens` on all the same, but for those of "generate".
        times: Of one call, or between two tokens of a generation; None where nothing could be measured.
        bytes: Least that one call has to move: weights once, the state in and out.
        flops: Of the matrix products of one call.
        floor: Seconds that bytes and FLOPs take at the measured ceilings, whichever is longer.
        memory: Peak in bytes above what was in use before the runtime was loaded; None where it can't be told.
        note: Why nothing was measured, or "".
    """

    program: Program
    batch: int
    tokens: int
    fed: int
    times: Times | None
    bytes: int
    flops: int
    floor: float
    memory: int | None = None
    note: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt tokens read, or tokens decoded in all sequences, per second."""
        if self.times is None:
            return None
        return self.batch * (self.tokens if self.program == "prefill" else 1) / self.times.median

    @property
    def of_roofline(self) -> float | None:
        """The floor over the median time: 1 is all that the device gives."""
        return None if self.times is None else self.floor / self.times.median


@dataclass(frozen=True)
class Parity:
    """What was compared with the eager model before anything was timed.

    Attributes:
        passed: Whether all of it is within its limit.
        logits: Worst relative error of the logits.
        limit: Of that error.
        reason: What failed, or "".
    """

    passed: bool
    logits: float
    limit: float
    reason: str = ""


@dataclass(frozen=True)
class RuntimeResult:
    """One runtime.

    Attributes:
        runtime: Its name.
        version: Of its package.
        lowering: Of the graphs that it runs, or None where it runs none.
        parity: None where it could not be loaded.
        memory_by: How its memory was measured.
        loaded: Bytes in use once it was loaded; None where that can't be told.
        rows: In the order they were measured; empty where nothing was timed.
        error: Why nothing was timed, or "".
    """

    runtime: str
    version: str
    lowering: str | None
    parity: Parity | None = None
    memory_by: str = ""
    loaded: int | None = None
    rows: tuple[Row, ...] = ()
    error: str = ""

    def row(self, program: Program, batch: int, tokens: int) -> Row | None:
        """Return the row of a case, or None."""
        return next((r for r in self.rows if (r.program, r.batch, r.tokens) == (program, batch, tokens)), None)


@dataclass(frozen=True)
class BenchReport:
    """Everything that a run measured.

    Attributes:
        bundle: Name of the bundle's folder.
        model: Layers, width, heads, vocabulary and parameters.
        dtype: Of weights and activations.
        device: "cpu" or "cuda".
        device_name: What the device calls itself.
        threads: CPU threads, or None for each runtime's own choice.
        ceilings: Of the device.
        weight_bytes: Of the weights.
        state_bytes: Of one sequence's state, whatever its length.
        reference: What parity was checked against.
        results: One for each runtime.
        options: The cases.
        versions: Of what measured.
        created: When, in ISO 8601.
        seconds: How long it took.
    """

    bundle: str
    model: dict[str, int]
    dtype: str
    device: str
    device_name: str
    threads: int | None
    ceilings: Ceilings
    weight_bytes: int
    state_bytes: int
    reference: str
    results: tuple[RuntimeResult, ...]
    options: dict[str, Any]
    versions: dict[str, str]
    created: str
    seconds: float

    @property
    def timed(self) -> tuple[RuntimeResult, ...]:
        """The runtimes that gave a figure."""
        return tuple(result for result in self.results if any(row.times for row in result.rows))

    def require_results(self) -> None:
        """Raise where a runtime differed from the eager model (ParityError), or none was timed (RuntimeTargetError)."""
        wrong = [result for result in self.results if result.parity is not None and not result.parity.passed]
        if wrong:
            raise ParityError("; ".join(f"{result.runtime}: {result.error}" for result in wrong))
        if not self.timed:
            notes = [result.error or next((row.note for row in result.rows), "") for result in self.results]
            reasons = "; ".join(f"{result.runtime}: {note}" for result, note in zip(self.results, notes, strict=True))
            raise RuntimeTargetError(f"no runtime could be timed on {self.device}: {reasons}")

    def to_json(self) -> dict[str, Any]:
        """Return the report in types that JSON has."""
        fields = dataclasses.asdict(self)
        for result, found in zip(fields["results"], self.results, strict=True):
            for row, measured in zip(result["rows"], found.rows, strict=True):
                row["tokens_per_second"] = measured.tokens_per_second
                row["of_roofline"] = measured.of_roofline
        return {"schema_version": SCHEMA_VERSION, **fields}
