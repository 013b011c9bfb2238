"""Decode by captured steps: whose state lives where, what it costs, and what is left when something fails."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from tests.tnllm_export.runtime.fake_graphs import Capture
from tests.tnllm_export.runtime.states import some_state
from tnllm_export.errors import DeviceMemoryError, PromptError, RuntimeTargetError, StateError
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.fused_decode import FusedDecoder
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import State, TorchRuntime
from tnllm_export.runtime.cuda_graphs import CudaCapture
from tnllm_export.runtime.decode_graphs import MOST_GRAPHS, decode_step, graph_batch


def ids(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(97, (batch, 1), generator=torch.Generator().manual_seed(seed))


def step(runtime: TorchRuntime, state: State, seed: int = 0, position: int = 7) -> tuple[Tensor, State]:
    batch = len(runtime.host_state(state)[0])
    return runtime.decode(ids(batch, seed), torch.full((batch,), position), state)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """A padded batch adds the same float32 products in another order."""
    assert found.shape == expected.shape
    assert (found - expected).norm() < 5e-6 * expected.norm()


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_captured_steps_answer_as_eager_ones(captured: TorchRuntime, eager: TorchRuntime, batch: int) -> None:
    states = [some_state(runtime, batch) for runtime in (captured, eager)]
    for t in range(4):
        logits, states[0] = step(captured, states[0], seed=t, position=t)
        expected, states[1] = step(eager, states[1], seed=t, position=t)
        assert_close(logits, expected)
    for found, wanted in zip(captured.host_state(states[0]), eager.host_state(states[1]), strict=True):
        assert_close(found, wanted)


def test_fused_kernels_are_captured_where_they_run(
    model: TransnormerForCausalLM, captured: TorchRuntime, eager: TorchRuntime
) -> None:
    assert decode_step(model, 2) == model.decode_in_place
    states = [some_state(runtime, 2) for runtime in (captured, eager)]
    with use_kernels("triton"):
        assert isinstance(getattr(decode_step(model, 2), "__self__", None), FusedDecoder)
        for t in range(2):
            logits, states[0] = step(captured, states[0], seed=t)
    for t in range(2):
        expected, states[1] = step(eager, states[1], seed=t)
    assert_close(logits, expected)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 24)])
def test_graphs_are_made_for_few_numbers_of_sequences(batch: int, rows: int) -> None:
    assert graph_batch(batch) == rows


def test_a_graph_is_captured_once_and_replayed_for_every_token_and_every_sequence(
    captured: TorchRuntime, capture: Capture
) -> None:
    for seed in range(2):
        state = some_state(captured, 3, seed)
        for _ in range(5):
            _, state = step(captured, state)
    assert capture.batches == [4]
    assert capture.replays == 10


def test_a_state_that_is_decoded_on_stays_where_it_is(captured: TorchRuntime) -> None:
    places = []
    state = some_state(captured, 2)
    for _ in range(3):
        _, state = step(captured, state)
        places.append([tensor.data_ptr() for tensor in state.tensors])  # type: ignore[attr-defined]
    assert places[0] == places[1] == places[2]


def test_states_decoded_in_turns_keep_apart_whatever_their_number(captured: TorchRuntime, eager: TorchRuntime) -> None:
    states = [
        [some_state(runtime, batch, seed) for seed, batch in enumerate((2, 1, 2, 2))] for runtime in (captured, eager)
    ]
    for t in range(3):
        for which in range(4):
            logits, states[0][which] = step(captured, states[0][which], seed=which, position=t)
            expected, states[1][which] = step(eager, states[1][which], seed=which, position=t)
            assert_close(logits, expected)
    for found, wanted in zip(states[0], states[1], strict=True):
        for one, other in zip(captured.host_state(found), eager.host_state(wanted), strict=True):
            assert_close(one, other)


def test_a_state_that_nobody_holds_is_not_moved_out(captured: TorchRuntime) -> None:
    _, state = step(captured, some_state(captured, 1))
    [graph] = captured._graphs._graphs.values()  # type: ignore[union-attr]
    assert graph._living() is state
    del state
    gc.collect()
    assert graph._living() is None


def test_a_prefill_reads_a_state_that_lives_in_a_graph_and_leaves_it(captured: TorchRuntime) -> None:
    _, state = step(captured, some_state(captured, 3))
    before = captured.host_state(state)
    lengths = torch.tensor([2, 1, 2], dtype=torch.int32)
    arguments = (torch.cat((ids(3), ids(3, 1)), dim=1), lengths, torch.full((3,), 8))
    first, after = captured.prefill(*arguments, state)
    assert_equal(captured.host_state(state), before)
    step(captured, state)
    moved = captured.device_state(before)
    second, after_moved = captured.prefill(*arguments, moved)
    assert torch.equal(first, second)
    assert_equal(captured.host_state(after), captured.host_state(after_moved))


def test_only_so_many_graphs_are_kept_and_their_states_outlive_them(
    captured: TorchRuntime, eager: TorchRuntime, capture: Capture
) -> None:
    batches = (1, 2, 4, 8, 16, 24)
    states = {batch: step(captured, some_state(captured, batch))[1] for batch in batches}
    expected = {batch: step(eager, some_state(eager, batch))[1] for batch in batches}
    assert len(captured._graphs._graphs) == MOST_GRAPHS  # type: ignore[union-attr]
    for batch in batches:
        logits, states[batch] = step(captured, states[batch], seed=1)
        wanted, expected[batch] = step(eager, expected[batch], seed=1)
        assert_close(logits, wanted)
    assert len(capture.batches) > len(batches)


def test_a_consumed_state_holds_no_memory_and_is_refused(captured: TorchRuntime) -> None:
    state = some_state(captured, 1)
    step(captured, state)
    assert state.tensors == ()  # type: ignore[attr-defined]
    with pytest.raises(StateError, match="consumed by an earlier decode"):
        captured.decode(ids(1), torch.tensor([8]), state)


@pytest.mark.parametrize("lives", [False, True])
def test_a_refused_request_leaves_the_state_usable(captured: TorchRuntime, lives: bool) -> None:
    state = some_state(captured, 2)
    if lives:
        _, state = step(captured, state)
    before = captured.host_state(state)
    with pytest.raises(PromptError):
        captured.decode(torch.tensor([[1], [97]]), torch.tensor([1, 1]), state)
    assert_equal(captured.host_state(state), before)
    step(captured, state)


def test_memory_that_ends_at_capture_leaves_the_state_and_says_what_to_do(
    captured: TorchRuntime, eager: TorchRuntime, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**29, 80 * 2**30))
    capture.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore")
    state = some_state(captured, 2)
    with pytest.raises(DeviceMemoryError) as caught:
        step(captured, state)
    text = str(caught.value)
    assert "\n" not in text
    assert "2.00 GiB asked for, 1.50 GiB of 80.00 GiB free; decode fewer sequences at once" in text
    assert "2 sequences, whose state alone takes 18.0 KiB" in text
    capture.error = None
    logits, _ = step(captured, state)
    assert_close(logits, step(eager, some_state(eager, 2))[0])


class NoCuda:
    """Enough of `torch.cuda` to capture with: what is captured last decides how that ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: list[object] = []
        self.left: list[object] = []
        self.end: Exception | None = None
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        leave = lambda device, pool: self.left.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", leave, raising=False)  # absent without CUDA

    @contextmanager
    def graph(self, graph: object, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        yield
        if self.end is not None:
            raise self.end

    def wait_stream(self, stream: object) -> None:
        """Nothing runs."""

    def replay(self) -> None:
        """Nothing was captured."""


def test_a_step_that_cannot_be_captured_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = NoCuda(monkeypatch)
    capture = CudaCapture(torch.device("cpu"))
    cuda.end = RuntimeError("operation not permitted\nwhen stream is capturing")
    with pytest.raises(RuntimeTargetError) as caught:
        capture(lambda: torch.zeros(1))
    assert "\n" not in str(caught.value)
    assert "(operation not permitted when stream is capturing); run it with TNLLM_KERNELS=pytorch" in str(caught.value)
    cuda.end = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        capture(lambda: torch.zeros(1))
    cuda.end = None
    capture(lambda: torch.zeros(1))
    capture(lambda: torch.zeros(1))
    # After each that fails, one that shall succeed.
    failed, _, short, _, first, second = cuda.pools
    assert len({id(failed), id(short), id(first)}) == 3
    assert first is second
    assert cuda.left == [failed, short]


def test_a_capture_warms_up_before_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    NoCuda(monkeypatch)
    calls: list[Tensor] = []

    def call() -> Tensor:
        calls.append(torch.zeros(1))
        return calls[-1]

    assert CudaCapture(torch.device("cpu"))(call).logits is calls[2]
    assert CudaCapture(torch.device("cpu"), warm_ups=1)(call).logits is calls[4]


def test_a_pool_takes_the_memory_of_the_largest_graph_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    NoCuda(monkeypatch)
    taken: list[int] = []
    empty = torch.empty

    def counted(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        taken.append(size)
        return empty(size, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", counted)
    capture = CudaCapture(torch.device("cpu"), reserve=1000)
    for _ in range(2):
        capture(lambda: torch.zeros(1))
    assert taken == [1000]


def test_a_pool_is_shared_as_long_as_one_of_its_graphs_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def replay(self) -> None:
            """Nothing was captured."""

    cuda = NoCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    capture = CudaCapture(torch.device("cpu"))
    kept = [capture(lambda: torch.zeros(1)) for _ in range(2)]
    del kept[0]
    kept.append(capture(lambda: torch.zeros(1)))
    kept.clear()
    capture(lambda: torch.zeros(1))
    first, second, third, fourth = cuda.pools
    assert first is second is third
    assert fourth is not first


def test_memory_that_ends_when_a_state_moves_out_harms_neither(
    captured: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * 2**30))
    _, living = step(captured, some_state(captured, 1))
    other = some_state(captured, 1, seed=1)
    before = captured.host_state(living), captured.host_state(other)

    def no_memory(tensor: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", no_memory)
        with pytest.raises(DeviceMemoryError, match="more memory asked for"):
            step(captured, other)
    assert_equal(captured.host_state(living), before[0])
    assert_equal(captured.host_state(other), before[1])
    step(captured, other)
    step(captured, living)
