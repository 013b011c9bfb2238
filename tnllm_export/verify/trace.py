"""A trace: everything one runtime answers on a case, copied to the host, so that models need not be loaded together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnllm_export.errors import ParityError
from tnllm_export.runtime.protocol import Runtime, State
from tnllm_export.verify.cases import Case
from tnllm_export.verify.measure import root_mean_square, top_gap
from tnllm_export.verify.records import Stage

Place = tuple[int, int]
"""Row, and position in the row's text of the token that was fed."""


@dataclass(frozen=True)
class GreedyTrace:
    """Free-running greedy decoding: tokens, logit gap of first to second choice, rms of the logits, [B, n] each."""

    tokens: Tensor
    gap: Tensor
    rms: Tensor


@dataclass(frozen=True)
class Trace:
    """Logits [vocab] by place, and states [B, H, K, V] per layer, of each stage; and the greedy tokens."""

    logits: dict[Stage, dict[Place, Tensor]] = field(default_factory=dict)
    states: dict[Stage, list[Tensor]] = field(default_factory=dict)
    greedy: GreedyTrace | None = None


def record(runtime: Runtime, case: Case, fed: Callable[[int], None], *, pieces: bool = True) -> Trace:
    """Run a case.

    Args:
        runtime: What is run.
        case: What it is fed.
        fed: Called with the number of tokens that have just been fed.
        pieces: Whether to feed the prompt in pieces too.

    Raises:
        ParityError: Logits of a wrong shape, which can't be compared.
    """
    trace = Trace()
    B = case.input_ids.shape[0]
    zero = torch.zeros(B, dtype=torch.int64)
    trace.logits["prefill"], state = _prefill(runtime, case.input_ids, case.lengths, zero, runtime.initial_state(B))
    trace.states["prefill"] = after_prompt = runtime.host_state(state)
    fed(case.input_ids.numel())
    if pieces:
        trace.logits["pieces"], pieced = _prefill_in_pieces(runtime, case, fed)
        trace.states["pieces"] = runtime.host_state(pieced)
    trace.logits["decode"], state = _decode(runtime, case, state, fed)
    trace.states["decode"] = runtime.host_state(state)
    if case.greedy == 0:
        return trace
    lengths = case.lengths.tolist()
    last = torch.stack([trace.logits["prefill"][row, length - 1] for row, length in enumerate(lengths)])
    run = _greedy(runtime, case, last, runtime.device_state(after_prompt), fed)
    return Trace(trace.logits, trace.states, run)


def _prefill(
    runtime: Runtime, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State
) -> tuple[dict[Place, Tensor], State]:
    """Feed [B, T] tokens and file the logits of the valid ones: the last of each row, or all where there are all."""
    logits, state = runtime.prefill(input_ids, lengths, positions, state)
    every = runtime.info.logits == "all"
    B, T = input_ids.shape
    _check_shape(runtime, logits, (B, T) if every else (B,))
    filed = {}
    for row, (length, start) in enumerate(zip(lengths.tolist(), positions.tolist(), strict=True)):
        for t in range(length) if every else range(max(length - 1, 0), length):
            # A copy: the runtime may write its next answer into the same memory.
            filed[row, start + t] = (logits[row, t] if every else logits[row]).cpu().clone()
    return filed, state


def _prefill_in_pieces(runtime: Runtime, case: Case, fed: Callable[[int], None]) -> tuple[dict[Place, Tensor], State]:
    B, T = case.input_ids.shape
    state = runtime.initial_state(B)
    filed: dict[Place, Tensor] = {}
    for start in range(0, T, case.piece):
        ids = case.input_ids[:, start : start + case.piece].contiguous()
        # A row that has ended takes part with length 0 and keeps its state.
        lengths = (case.lengths - start).clamp(0, ids.shape[1])
        positions = case.lengths.to(torch.int64).clamp(max=start)
        logits, state = _prefill(runtime, ids, lengths, positions, state)
        filed |= logits
        fed(ids.numel())
    return filed, state


def _decode(
    runtime: Runtime, case: Case, state: State, fed: Callable[[int], None]
) -> tuple[dict[Place, Tensor], State]:
    positions = case.lengths.to(torch.int64)
    B = len(positions)
    filed: dict[Place, Tensor] = {}
    for step in range(case.continuation.shape[1]):
        ids = case.continuation[:, step : step + 1].contiguous()
        logits, state = runtime.decode(ids, positions, state)
        _check_shape(runtime, logits, (B,))
        for row, position in enumerate(positions.tolist()):
            filed[row, position] = logits[row].cpu().clone()
        positions = positions + 1
        fed(B)
    return filed, state


def _greedy(runtime: Runtime, case: Case, last: Tensor, state: State, fed: Callable[[int], None]) -> GreedyTrace:
    positions = case.lengths.to(torch.int64)
    tokens, gaps, sizes = [], [], []
    for _ in range(case.greedy):
        chosen = last.argmax(-1)
        tokens.append(chosen)
        gaps.append(top_gap(last))
        sizes.append(root_mean_square(last))
        logits, state = runtime.decode(chosen[:, None].contiguous(), positions, state)
        last = logits.cpu().clone()
        positions = positions + 1
        fed(len(positions))
    return GreedyTrace(torch.stack(tokens, 1), torch.stack(gaps, 1), torch.stack(sizes, 1))


def _check_shape(runtime: Runtime, logits: Tensor, leading: tuple[int, ...]) -> None:
    expected = (*leading, runtime.info.config.vocab_size)
    if tuple(logits.shape) != expected or logits.dtype != torch.float32:
        raise ParityError(
            f"{runtime.info.name} returned logits {logits.dtype} {list(logits.shape)}; expected torch.float32 "
            f"{list(expected)}: the graph is not the one that the bundle describes; export it again"
        )
