"""Tracing beside everything else an export does: what is imported for it takes as long as the tracing itself."""
# ruff: noqa: PLC0415 - what traces is imported in the process that traces

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tnllm_export.export.forked import Forked
from tnllm_export.graphs.traced import TracedProgram
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import Logits
from tnllm_export.progress import Progress


@dataclass(frozen=True)
class Tracing:
    """What is to be traced: a model of some configuration and dtype, whose prefill gives some logits."""

    config: TransnormerConfig
    dtype: torch.dtype
    logits: Logits


def trace_programs(receive: Callable[[], Tracing], progress: Progress) -> Iterator[tuple[str, TracedProgram]]:
    """Import what traces, ask what is to be traced, and give the name and the trace of each program; see `Forked`.

    Raises:
        ExportError: torch.export refused a program.
    """
    from tnllm_export.export.programs import Tracer
    from tnllm_export.graphs.traced import record

    wanted = receive()
    progress("making graphs", 0, 2, "graphs")
    tracer = Tracer(wanted.config, wanted.dtype)
    # Both at once: prefill here, and decode, which takes less, in a process that has all that was imported here.
    decoding: Forked[None, TracedProgram] = Forked(lambda receive, progress: iter([record(tracer.decode())]))
    with decoding:
        yield "prefill", record(tracer.prefill(wanted.logits))
        yield "decode", next(decoding.answers(None, progress))
