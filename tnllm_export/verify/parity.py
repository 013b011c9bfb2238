"""Compare any runtime with the eager model, on fresh random and on real text."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tnllm_export.errors import ParityError, RequestError
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime.protocol import Runtime, RuntimeInfo
from tnllm_export.verify.cases import Case, random_case, text_case
from tnllm_export.verify.judge import judge, subject_of
from tnllm_export.verify.records import ParityReport
from tnllm_export.verify.trace import Trace, record


@dataclass(frozen=True)
class Workload:
    """How much is compared.

    Attributes:
        lengths: Prompt lengths of the random ragged batch; the text's long prompt has the longest.
        decoded: Tokens fed one by one after each prompt.
        greedy: Tokens of free-running greedy decoding.
        piece: Tokens per call where prompts are fed in pieces.

    Raises:
        RequestError: A part of it is empty, so that something would not be compared.
    """

    # One token alone, one less than a chunk, one more than four chunks; and pieces that fit no chunk.
    lengths: tuple[int, ...] = (1, 63, 257)
    decoded: int = 32
    greedy: int = 32
    piece: int = 50

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise RequestError(f"workload: lengths are {self.lengths}; expected at least one, each of 1 or more tokens")
        for name, value, least in (("decoded", self.decoded, 1), ("greedy", self.greedy, 0), ("piece", self.piece, 1)):
            if value < least:
                raise RequestError(f"workload: {name} is {value}; expected {least} or more tokens")


def verify_runtime(
    candidate: Runtime,
    reference: Runtime,
    *,
    exact: Runtime | None = None,
    text_ids: Sequence[int] = (),
    text_source: str = "text",
    seed: int | None = None,
    workload: Workload | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare a runtime with the eager model.

    Args:
        candidate: What is verified.
        reference: The eager model in the same dtype.
        exact: The eager model in float32; needed where the dtype is a half one.
        text_ids: Token ids of real text; none leaves that case out.
        text_source: What the report calls the text.
        seed: Of the random token ids; fresh by default, and reported.
        workload: How much is compared.
        progress: Told the tokens that have been fed.

    Raises:
        ParityError: The two can't be compared at all. Differences raise nothing: see `ParityReport.passed`.
        PromptError: The text is too short.
    """
    started = time.monotonic()
    seed = fresh_seed() if seed is None else seed
    if candidate.info.dtype != reference.info.dtype:
        raise ParityError(
            f"the reference is {reference.info.dtype}; expected {candidate.info.dtype}, the dtype of what is verified"
        )
    cases = make_cases(reference.info, seed, workload or Workload(), text_ids, text_source)
    answers = run_candidate(candidate, cases, progress)
    truth = run_eager(reference, cases, progress)
    exact_truth = None if exact is None else run_eager(exact, cases, progress)
    subject = subject_of(candidate.info)
    return judge(subject, cases, answers, truth, exact_truth, seed=seed, seconds=time.monotonic() - started)


def fresh_seed() -> int:
    """Return a seed that no earlier run has seen."""
    return secrets.randbits(31)


def make_cases(
    info: RuntimeInfo, seed: int, workload: Workload, text_ids: Sequence[int], text_source: str
) -> list[Case]:
    """Return the random case, and the text case where there is text."""
    work = (workload.decoded, workload.piece, workload.greedy)
    cases = [random_case(info.config.vocab_size, seed, workload.lengths, *work)]
    if text_ids:
        cases.append(text_case(text_ids, text_source, max(workload.lengths), *work))
    return cases


def run_candidate(runtime: Runtime, cases: list[Case], progress: Progress) -> list[Trace]:
    """Record all that is compared."""
    return _record_all(runtime, cases, progress, pieces=True)


def run_eager(runtime: Runtime, cases: list[Case], progress: Progress) -> list[Trace]:
    """Record the truth, without prompts in pieces: those are held against whole ones."""
    return _record_all(runtime, cases, progress, pieces=False)


def _record_all(runtime: Runtime, cases: list[Case], progress: Progress, *, pieces: bool) -> list[Trace]:
    info = runtime.info
    total = sum(case.work(pieces=pieces) for case in cases)
    fed = _counter(progress, f"running {info.name} in {info.dtype}", total)
    return [record(runtime, case, fed, pieces=pieces) for case in cases]


def _counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Return a function that adds up tokens and reports the sum."""
    done = 0

    def fed(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(stage, done, total, "tokens")

    return fed
