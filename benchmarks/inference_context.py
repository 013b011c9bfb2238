"""The paper's inference figure: latency and memory over context, beside a Transformer of the same size.

One sequence. Ours has read as many tokens as the context has; the Transformer's cache holds as many and has room for no
more. Both steps are CUDA graphs, timed by replaying; memory is what tensors take while a token is decoded, weights
included. The Transformer's attention is the form that was quickest in this run at that length; its other pieces are
compiled by torch.compile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_timing import ceilings, describe, milliseconds, set_count
from benchmarks.inference_models import loop_milliseconds, random_llama, time_limit
from benchmarks.inference_plan import PEAK, TOKEN_TIME, Plan, Size, release, state_bytes, token_floor, weight_bytes
from benchmarks.llama import Llama
from benchmarks.llama_decode import Attention, LlamaDecoder, attention_forms, softmax_by_products
from benchmarks.names import DEVICE_ONLY, HOST, INFERENCE, INFERENCE_ATTENTION, INFERENCE_CONTEXT, LLAMA_DECODE
from benchmarks.records import Record, gpu_versions
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import TorchRuntime
from tnllm_export.runtime.decode_graphs import decode_step

ATTENTION_ERROR_LIMIT = 2e-2


def context_records(size: Size, model: TransnormerForCausalLM, plan: Plan) -> Iterator[Record]:
    """Ours at every context, then the Transformer with ours beside it."""
    ours = dict(over_contexts(size, model, plan))
    first, last = (ours[context] for context in (plan.contexts[0], plan.contexts[-1]))
    for how, values in ((DEVICE_ONLY, (last.graph_ms, first.graph_ms)), (HOST, (last.loop_ms, first.loop_ms))):
        yield Record(INFERENCE, f"{size.name} | decode at {plan.contexts[-1]} tokens of context, {how}", TOKEN_TIME,
                     "ms", values[0], None, f"at {plan.contexts[0]} tokens", values[1], gpu_versions())  # fmt: skip
    release(plan.device)
    state, resident = state_bytes(size.config, 1), _allocated(plan)
    floor = token_floor(weight_bytes(model), state, state, plan.device)
    llama = random_llama(size.llama, plan.dtype, plan.device)
    for context in plan.contexts:
        name, found = LLAMA_DECODE, None
        try:
            timed = dict(attention_times(size, context, plan))
            yield from _attention_records(size, context, timed, plan)
            release(plan.device)
            found = transformer_cost(llama, size, context, _quickest(timed, plan), plan, resident)
        except Exception as error:
            name = f"{LLAMA_DECODE} (absent: {describe(error)})"
        release(plan.device)
        case, cost = f"{size.name} | {context}", ours[context]
        yield Record(INFERENCE_CONTEXT, case, TOKEN_TIME, "ms", cost.graph_ms, floor, name, found and found[0],
                     gpu_versions())  # fmt: skip
        yield Record(INFERENCE_CONTEXT, case, PEAK, "GiB", cost.peak / 2**30, None, name, found and found[1] / 2**30,
                     gpu_versions())  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of a token at some context: the graph's milliseconds, the greedy loop's, and the peak bytes of the loop."""

    graph_ms: float
    loop_ms: float
    peak: float


def over_contexts(size: Size, model: TransnormerForCausalLM, plan: Plan) -> Iterator[tuple[int, Cost]]:
    """Read a prompt on and on, and decode some tokens at each context."""
    token, position = (torch.zeros(shape, dtype=torch.int64, device=plan.device) for shape in ((1, 1), (1,)))
    states, step = model.initial_state(1), decode_step(model, 1)
    captured = plan.captures()(lambda: step(token, position, states))
    release(plan.device)
    resident = _allocated(plan) - weight_bytes(model)
    runtime = TorchRuntime(model, capture=plan.capture)
    reader = Reader(runtime, size.config.vocab_size, plan.piece)
    for context in plan.contexts:
        reader.read_to(context)
        for own, tensor in zip(states, runtime.host_state(reader.state), strict=True):
            own.copy_(tensor)
        position.fill_(context)
        graph_ms = milliseconds([captured.replay], plan.device)
        release(plan.device)
        _reset_peak(plan)
        loop_ms = loop_milliseconds(reader, 1, context, budget_s=0.2)
        yield context, Cost(graph_ms, loop_ms, _peak(plan) - resident)


class Reader:
    """One sequence that is read and decoded in turns; a `Step`."""

    def __init__(self, runtime: TorchRuntime, vocab_size: int, piece: int) -> None:
        self.state = runtime.initial_state(1)
        self._runtime = runtime
        self._vocab_size = vocab_size
        self._piece = piece
        self._tokens = 0

    def read_to(self, context: int) -> None:
        """Feed random tokens until there are so many."""
        while self._tokens < context:
            count = min(self._piece, context - self._tokens)
            ids = torch.randint(self._vocab_size, (1, count), generator=torch.Generator().manual_seed(context))
            lengths, positions = torch.tensor([count], dtype=torch.int32), torch.tensor([self._tokens])
            _, self.state = self._runtime.prefill(ids, lengths, positions, self.state)
            self._tokens += count

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Decode one token; return its logits."""
        logits, self.state = self._runtime.decode(input_ids, positions, self.state)
        self._tokens += 1
        return logits


def attention_times(size: Size, context: int, plan: Plan) -> Iterator[tuple[str, float | str]]:
    """Milliseconds of one layer's attention by form, as it runs in a graph, or why a form is out."""
    heads, head_dim = size.llama.heads, size.llama.width // size.llama.heads
    query = torch.randn(1, heads, 1, head_dim, dtype=plan.dtype, device=plan.device)
    # So many caches that none is found in the L2 cache.
    sets = set_count(4 * heads * context * head_dim) if plan.device == "cuda" else 1
    caches = [torch.randn(2, 1, heads, context, head_dim, dtype=plan.dtype, device=plan.device) for _ in range(sets)]
    exact = softmax_by_products(query.float(), *caches[0].float())
    for name, form in attention_forms(plan.device).items():
        try:
            error = float((form(query, *caches[0]).float() - exact).norm() / exact.norm())
            if not error < ATTENTION_ERROR_LIMIT:
                raise ArithmeticError(f"relative error {error:.1e}")  # noqa: TRY301
            captured = plan.captures()(partial(_all_layers, form, query, caches))
            yield name, milliseconds([captured.replay], plan.device, budget_ms=30) / sets
        except Exception as error:
            yield name, describe(error)


def transformer_cost(
    llama: Llama, size: Size, context: int, attention: Attention, plan: Plan, resident: int
) -> tuple[float, float]:
    """Return the Transformer's milliseconds per token at a context, and the bytes that it takes above `resident`."""
    decoder = LlamaDecoder(llama, size.llama, 1, context, attention, compiled=plan.compiled)
    ids = torch.full((1, 1), 5, device=plan.device)
    with time_limit(plan.compile_s):
        captured = plan.captures()(partial(decoder.decode, ids))
    time_ms = milliseconds([captured.replay], plan.device)
    release(plan.device)
    _reset_peak(plan)
    captured.replay()
    return time_ms, _peak(plan) - resident


def _all_layers(form: Attention, query: Tensor, caches: list[Tensor]) -> Tensor:
    answer = query
    for keys, values in caches:
        answer = form(query, keys, values)
    return answer


def _attention_records(size: Size, context: int, timed: dict[str, float | str], plan: Plan) -> Iterator[Record]:
    bytes_ = 2 * context * size.llama.width * plan.dtype.itemsize
    floor = 1e6 * bytes_ / ceilings(plan.device).bandwidth
    for name, found in timed.items():
        peer = f"{name} (absent: {found})" if isinstance(found, str) else name
        value = None if isinstance(found, str) else 1e3 * found
        yield Record(INFERENCE_ATTENTION, f"{size.name} | {context}", "time of one layer", "µs", None, floor, peer,
                     value, gpu_versions())  # fmt: skip


def _quickest(timed: dict[str, float | str], plan: Plan) -> Attention:
    times = {name: found for name, found in timed.items() if not isinstance(found, str)}
    return attention_forms(plan.device)[min(times, key=lambda name: times[name])]


def _allocated(plan: Plan) -> int:
    return torch.cuda.memory_allocated() if plan.device == "cuda" else 0


def _reset_peak(plan: Plan) -> None:
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(plan: Plan) -> float:
    return float(torch.cuda.max_memory_allocated()) if plan.device == "cuda" else 0.0
