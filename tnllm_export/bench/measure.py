"""Timing the cases on a loaded runtime."""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tnllm_export.bench.memory import Meter, release
from tnllm_export.bench.options import BenchOptions
from tnllm_export.bench.records import Ceilings, Program, Row
from tnllm_export.bench.roofline import work_of
from tnllm_export.bench.timing import LEAST_CALLS, summarize, time_calls
from tnllm_export.errors import RequestError, RuntimeTargetError
from tnllm_export.generate import Generator, SamplingParams
from tnllm_export.progress import Progress
from tnllm_export.runtime import Runtime, State

_PREFILL_CALLS = 20
_DECODE_WARM_UP = 6  # what is captured or compiled has then been so for both directions of a ping-pong
_PIECE = 2048
_FEEDING_SHARE = 0.1
_FEW = 64


@dataclass
class Bench:
    """Times one runtime.

    Attributes:
        runtime: A loaded runtime that has passed its parity check.
        device: Where it runs.
        ceilings: Of the device.
        options: The cases.
        meter: Of its memory.
        progress: Told of each case.
    """

    runtime: Runtime
    device: torch.device
    ceilings: Ceilings
    options: BenchOptions
    meter: Meter
    progress: Progress
    _feeding: float = field(default=0.0, init=False)
    _prefill_rate: float = field(default=0.0, init=False)

    def run(self, seconds: float) -> tuple[Row, ...]:
        """Time every case in at most so many seconds. One that fails says why, and the others go on."""
        cases = self.options
        todo: list[tuple[Program, int, int]] = [("prefill", 1, tokens) for tokens in cases.prompt_lengths]
        todo += [("decode", batch, context) for batch, context in cases.decode_cases]
        todo += [("generate", batch, context) for batch, context in cases.generate_cases]
        end = time.perf_counter() + seconds
        stage = f"timing {self.runtime.info.name}"
        self._feeding = _FEEDING_SHARE * seconds
        rows: list[Row] = []
        for done, (program, batch, tokens) in enumerate(todo):
            self.progress(stage, done, len(todo), "cases")
            now = time.perf_counter()
            deadline = now + (end - now) / (len(todo) - done)
            rows.append(self._case(program, batch, tokens, deadline, out_of_time=now > end))
        self.progress(stage, len(todo), len(todo), "cases")
        return tuple(rows)

    def _case(self, program: Program, batch: int, tokens: int, deadline: float, *, out_of_time: bool) -> Row:
        info = self.runtime.info
        work = work_of(
            info.config,
            info.dtype,
            batch,
            tokens if program == "prefill" else 1,
            all_logits=program == "prefill" and info.logits == "all",
        )
        row = Row(program, batch, tokens, 0, None, work.bytes, work.flops, work.seconds(self.ceilings))
        if out_of_time:
            return replace(row, note=f"the time limit of {self.options.time_limit:g} s had passed")
        self.meter.reset()
        try:
            timed = {"prefill": self._prefill, "decode": self._decode, "generate": self._generate}
            return timed[program](row, deadline)
        except (RuntimeTargetError, RequestError) as error:
            note = str(error)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            message = " ".join(str(error).split())
            note = f"out of memory: {message.rpartition('DefaultCPUAllocator: ')[2][:160]}"
        finally:
            release(self.device)
        return replace(row, note=note)

    def _prefill(self, row: Row, deadline: float) -> Row:
        ids = self._random_ids(row.batch, row.tokens)
        state = self.runtime.initial_state(row.batch)
        lengths = torch.full((row.batch,), row.tokens, dtype=torch.int32)
        positions = torch.zeros(row.batch, dtype=torch.int64)

        def call() -> Tensor:
            logits, _ = self.runtime.prefill(ids, lengths, positions, state)
            return choose(logits if logits.dim() == 2 else logits[:, -1])

        times = time_calls(call, _PREFILL_CALLS, deadline, warm_up=2)
        self._prefill_rate = row.tokens / times.median
        return replace(row, fed=row.tokens, times=times, memory=self.meter.peak())

    def _decode(self, row: Row, deadline: float) -> Row:
        fed = self._fed_before(row)
        state, token = self._feed(row.batch, fed)
        step = _Step(self.runtime, state, token, row.tokens)
        times = time_calls(step, self.options.tokens, deadline, warm_up=_DECODE_WARM_UP)
        return replace(row, fed=fed, times=times, memory=self.meter.peak())

    def _generate(self, row: Row, deadline: float) -> Row:
        fed = self._fed_before(row)
        generator = Generator(self.runtime, prefill_chunk=self._piece(row.batch))
        tokens = 1 + _DECODE_WARM_UP + self.options.tokens
        params = SamplingParams(max_new_tokens=tokens, stop_at_eos=False)
        came: list[float] = []
        for event in generator.stream(self._random_ids(row.batch, fed).tolist(), params):
            if event.index == 0:
                came.append(time.perf_counter())
                if len(came) > 1 + LEAST_CALLS and came[-1] > deadline:
                    break
        # The first token comes from the prompt.
        seconds = [after - before for before, after in itertools.pairwise(came)]
        warm_up = min(_DECODE_WARM_UP, len(seconds) - LEAST_CALLS)
        return replace(row, fed=fed, times=summarize(seconds[warm_up:]), memory=self.meter.peak())

    def _fed_before(self, row: Row) -> int:
        """All of the context where that takes a fair share of the time, else a few tokens."""
        cases = len(self.options.decode_cases) + len(self.options.generate_cases)
        affordable = self._feeding / cases * self._prefill_rate / row.batch
        return row.tokens if row.tokens <= max(_FEW, affordable) else _FEW

    def _feed(self, batch: int, tokens: int) -> tuple[State, Tensor]:
        """Return the state after random tokens, fed in pieces, and the token chosen then, [B, 1]."""
        state = self.runtime.initial_state(batch)
        chosen = torch.zeros(batch, 1, dtype=torch.int64)
        piece = self._piece(batch)
        for start in range(0, tokens, piece):
            count = min(piece, tokens - start)
            lengths = torch.full((batch,), count, dtype=torch.int32)
            positions = torch.full((batch,), start)
            logits, state = self.runtime.prefill(self._random_ids(batch, count), lengths, positions, state)
            chosen = choose(logits if logits.dim() == 2 else logits[:, -1])
        return state, chosen

    def _piece(self, batch: int) -> int:
        """Tokens of each sequence that are fed in one call."""
        return max(1, min(_PIECE, max(self.options.prompt_lengths)) // batch)

    def _random_ids(self, batch: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(self.runtime.info.config.vocab_size, (batch, tokens), generator=generator)


class _Step:
    """Decodes one more token of each sequence, and chooses the next."""

    def __init__(self, runtime: Runtime, state: State, token: Tensor, position: int) -> None:
        self._decode: Callable[[Tensor, Tensor, State], tuple[Tensor, State]] = runtime.decode
        self._state = state
        self._token = token
        self._positions = torch.full((len(token),), position)

    def __call__(self) -> None:
        logits, self._state = self._decode(self._token, self._positions, self._state)
        self._token = choose(logits)
        self._positions = self._positions + 1


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing, of the GPU or of the host: allocators have no common error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return re.search(r"(can't|failed to) allocate memory|not enough memory|bad.alloc", str(error), re.I) is not None


def choose(logits: Tensor) -> Tensor:
    """Return the likeliest token of each sequence, [B, 1] on the host: what waits for all that was enqueued."""
    return logits.argmax(-1, keepdim=True).cpu()
