"""Prefill of short prompts: which size reads which prompt, when it is captured, and that nothing else changes."""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tnllm_export.runtime.fake_graphs import Capture
from tnllm_export.errors import RuntimeTargetError
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.fused_prefill import prefill
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import State, TorchRuntime, prefill_graphs
from tnllm_export.runtime.cuda_graphs import Captured, CudaCapture
from tnllm_export.runtime.prefill_graphs import MOST_GRAPHS, PrefillGraphs, activation_bytes, graph_tokens

Answer = tuple[Tensor, State]


def graphs(runtime: TorchRuntime) -> PrefillGraphs:
    assert runtime._prefill_graphs is not None
    return runtime._prefill_graphs


def read(runtime: TorchRuntime, lengths: list[int], seed: int = 0, position: int = 0, width: int = 0) -> Answer:
    """Read random prompts of these lengths, behind a random state."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (len(lengths), max(*lengths, width)), generator=generator)
    zero = runtime.host_state(runtime.initial_state(len(lengths)))
    state = runtime.device_state([torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for tensor in zero])
    positions = torch.arange(len(lengths)) + position
    return runtime.prefill(ids, torch.tensor(lengths, dtype=torch.int32), positions, state)


def assert_close(runtime: TorchRuntime, found: Answer, other: TorchRuntime, expected: Answer) -> None:
    """A padded prompt adds the same float32 products in another order."""
    tensors = [found[0].cpu(), *runtime.host_state(found[1])]
    wanted = [expected[0].cpu(), *other.host_state(expected[1])]
    for one, another in zip(tensors, wanted, strict=True):
        assert one.shape == another.shape
        assert (one - another).norm() < 5e-6 * another.norm()


def assert_equal(runtime: TorchRuntime, found: Answer, expected: Answer) -> None:
    assert torch.equal(found[0], expected[0])
    for one, other in zip(runtime.host_state(found[1]), runtime.host_state(expected[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1, 16), (16, 16), (17, 32), (33, 64), (65, 128), (128, 128), (129, 192), (512, 512), (1000, 1024), (1985, 2048)],
)
def test_sizes_are_few_and_hardly_larger_than_what_they_read(tokens: int, size: int) -> None:
    assert graph_tokens(tokens) == size


def test_a_size_is_captured_when_it_comes_again_and_replayed_from_then_on(
    captured: TorchRuntime, capture: Capture
) -> None:
    for replays, length in enumerate((7, 16, 1, 12)):
        read(captured, [length], seed=length)
        assert capture.batches == ([] if length == 7 else [1])
        assert capture.replays == replays
    read(captured, [17])
    assert capture.batches == [1]


@pytest.mark.parametrize("lengths", [[1], [16], [63], [257], [5, 40, 1], [0, 9], [130, 3], [2] * 9])
def test_captured_prompts_are_answered_as_eager_ones(
    captured: TorchRuntime, eager: TorchRuntime, lengths: list[int]
) -> None:
    for seed in range(3):
        found, expected = (read(runtime, lengths, seed, position=7 * seed) for runtime in (captured, eager))
        assert_close(captured, found, eager, expected)
    with use_kernels("triton"):
        found = read(captured, lengths[:2], 1)
        again = read(captured, lengths[:2], 1)
    assert_close(captured, again, eager, read(eager, lengths[:2], 1))
    assert_equal(captured, found, again)


def test_the_same_prompt_is_answered_bit_for_bit_the_same_whatever_came_between(captured: TorchRuntime) -> None:
    first = read(captured, [20, 31, 4])
    for seed in range(1, 4):
        assert not torch.equal(read(captured, [32, 32, 32, 32], seed)[0][:3], first[0])
        assert_equal(captured, read(captured, [20, 31, 4]), first)


def test_answers_and_states_are_not_written_again_by_later_prompts(captured: TorchRuntime) -> None:
    answers = [read(captured, [20], seed) for seed in range(4)]
    kept = [(logits.clone(), captured.host_state(state)) for logits, state in answers]
    read(captured, [25], 9)
    captured.decode(torch.tensor([[3]]), torch.tensor([20]), answers[0][1])
    for (logits, state), (old_logits, old_state) in zip(answers[1:], kept[1:], strict=True):
        assert torch.equal(logits, old_logits)
        assert all(torch.equal(one, other) for one, other in zip(captured.host_state(state), old_state, strict=True))


def test_threads_get_their_own_answers(captured: TorchRuntime) -> None:
    expected = [read(captured, [20], seed) for seed in range(4)]

    def ask(seed: int) -> list[Answer]:
        return [read(captured, [20], seed) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for answers, wanted in zip(pool.map(ask, range(4)), expected, strict=True):
            for answer in answers:
                assert_equal(captured, answer, wanted)


def test_a_long_prompt_many_sequences_and_all_logits_are_read_without_graphs(
    model: TransnormerForCausalLM, captured: TorchRuntime, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = graphs(captured)
    assert small.take(1, 2048)
    assert not small.take(1, 2049)
    assert small.take(2, 1024)
    assert not small.take(3, 1024)
    with monkeypatch.context() as patched:
        patched.setattr(prefill_graphs, "MOST_STATE_BYTES", 4 * 3 * (32 + 16) * 16 * 4)  # of four sequences
        few = graphs(TorchRuntime(model, capture=capture))
    assert few.take(4, 16)
    assert not few.take(5, 16)
    monkeypatch.setattr(prefill_graphs, "MOST_TOKENS", 64)
    for _ in range(3):
        read(captured, [65])
    every = TorchRuntime(model, capture=capture, logits="all")
    for _ in range(3):
        assert read(every, [9])[0].shape == (1, 9, 97)
    assert capture.batches == []


def test_another_choice_of_kernels_is_another_graph(captured: TorchRuntime, capture: Capture) -> None:
    for _ in range(2):
        read(captured, [9])
    with use_kernels("pytorch"):
        read(captured, [9])
        assert capture.batches == [1]
        read(captured, [9])
    assert capture.batches == [1, 1]


def test_only_so_many_sizes_are_kept_and_no_state_longer_than_its_sizes(
    captured: TorchRuntime, capture: Capture
) -> None:
    for _ in range(2):
        read(captured, [9, 9])
    for size in range(MOST_GRAPHS):
        read(captured, [64 * size + 1])
    assert len(graphs(captured)._graphs) == MOST_GRAPHS
    assert list(graphs(captured)._states) == [1]
    before = read(captured, [9, 9])
    assert_equal(captured, read(captured, [9, 9]), before)
    assert capture.batches == [2, 2]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeTargetError("the work could not be captured (no luck)"), r"could not be captured \(no luck\)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "2.00 GiB asked for, 1.50 GiB of"),
    ],
    ids=["refused", "memory"],
)
def test_a_capture_that_fails_is_told_once_and_prompts_are_read_without(
    captured: TorchRuntime,
    eager: TorchRuntime,
    capture: Capture,
    error: Exception,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**29, 80 * 2**30))
    capture.error = error
    first = read(captured, [9])
    with pytest.warns(UserWarning, match=reason) as caught:
        assert_equal(captured, read(captured, [9]), first)
    assert "\n" not in str(caught[0].message)
    capture.error = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lengths in ([9], [9], [20, 3], [20, 3]):
            found = read(captured, lengths)
            assert_close(captured, found, eager, read(eager, lengths))
    assert capture.batches == []


def test_where_graphs_do_not_fit_they_go_and_the_prompt_is_read_alone(
    model: TransnormerForCausalLM,
    captured: TorchRuntime,
    eager: TorchRuntime,
    capture: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(batch: int) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * 2**30))
    for _ in range(2):
        read(captured, [9])
    expected = read(eager, [9, 4])
    with monkeypatch.context() as patched:
        patched.setattr(model, "initial_state", no_memory)
        assert_close(captured, read(captured, [9, 4]), eager, expected)
    assert not graphs(captured)._graphs
    assert not graphs(captured)._states
    for _ in range(2):
        assert_close(captured, read(captured, [9, 4]), eager, expected)
    assert capture.batches == [1, 2]


def test_the_pool_holds_what_a_layer_of_the_7b_shape_needs() -> None:
    from benchmarks.inference_plan import SIZES

    config = SIZES[0].config
    found = activation_bytes(config, 2048, torch.bfloat16)
    # Residual, norm, the projection, keys and queries doubled by LRPE, attention and the gate's product.
    assert 2048 * 2 * 4096 * (2 + 4 + 4 + 2) < found < 2**28


@pytest.mark.gpu
class TestOnAGpu:
    """Real graphs, on a model large enough that its matrix products differ with their shapes."""

    config = TransnormerConfig(
        vocab_size=997, decoder_embed_dim=512, decoder_layers=3, decoder_attention_heads=4, glu_dim=1408
    )

    def model(self, dtype: torch.dtype) -> TransnormerForCausalLM:
        torch.manual_seed(0)
        return TransnormerForCausalLM(self.config).requires_grad_(False).cast_weights(dtype).to("cuda")

    @pytest.mark.parametrize("lengths", [[1], [16], [100], [700], [40, 3, 0], [5] * 9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_captured_prompts_are_as_exact_as_eager_ones(self, dtype: torch.dtype, lengths: list[int]) -> None:
        model = self.model(dtype)
        captured, eager = TorchRuntime(model), TorchRuntime(model, capture=None)
        exact = TorchRuntime(copy.deepcopy(model).cpu().cast_weights(torch.float64))
        answers = [read(captured, lengths, position=5) for _ in range(4)]
        [graph] = graphs(captured)._graphs.values()
        assert graph.captured
        for answer in answers[1:]:
            assert_equal(captured, answer, answers[0])
        valid = [row for row, length in enumerate(lengths) if length]
        wanted = read(exact, lengths, position=5)
        plain = read(eager, lengths, position=5)
        pairs = (captured, answers[0]), (eager, plain), (exact, wanted)
        for one, another, right in zip(*(self.tensors(*pair, valid) for pair in pairs), strict=True):
            room, least = (4, 2e-6) if dtype == torch.float32 else (1.2, 1e-4)
            assert one.isfinite().all()
            assert error(one, right) <= max(room * error(another, right), least)

    @staticmethod
    def tensors(runtime: TorchRuntime, answer: Answer, rows: list[int]) -> list[Tensor]:
        return [tensor.cpu().double()[rows] for tensor in (answer[0], *runtime.host_state(answer[1]))]

    def test_prompts_of_one_size_replay_one_graph(self) -> None:
        capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
        captures: list[Captured] = []
        replays: list[Captured] = []

        def counted(call: Callable[[], Tensor]) -> Captured:
            captured = capture(call)
            captures.append(captured)

            def replay() -> None:
                replays.append(captured)
                captured.replay()

            return Captured(replay, captured.logits)

        runtime = TorchRuntime(self.model(torch.bfloat16), capture=counted)
        for length in (65, 128, 100, 70, 66):
            read(runtime, [length], seed=length)
        assert len(captures) == 1
        assert len(replays) == 4

    def test_inputs_on_the_gpu_answer_as_those_of_the_host(self) -> None:
        runtime = TorchRuntime(self.model(torch.float32))
        for seed in range(3):
            inputs = torch.randint(997, (3, 20 + seed)), torch.tensor([20, 3, 0], dtype=torch.int32), torch.arange(3)
            answers = [
                runtime.prefill(*(tensor.to(device) for tensor in inputs), runtime.initial_state(3))
                for device in ("cpu", "cuda")
            ]
            assert_equal(runtime, *answers)

    def test_prompts_that_are_not_waited_for_get_their_own_inputs(self) -> None:
        runtime = TorchRuntime(self.model(torch.bfloat16))
        expected = [read(runtime, [50], seed)[0].cpu() for seed in range(40)]
        found = [read(runtime, [50], seed)[0] for seed in range(40)]
        assert torch.equal(torch.stack([logits.cpu() for logits in found]), torch.stack(expected))

    def test_graphs_of_all_sizes_share_the_memory_of_the_largest(self) -> None:
        config = TransnormerConfig(
            vocab_size=997, decoder_embed_dim=1024, decoder_layers=1, decoder_attention_heads=8, glu_dim=8192
        )
        model = TransnormerForCausalLM(config).requires_grad_(False).cast_weights(torch.bfloat16).to("cuda")
        runtime = TorchRuntime(model)
        reserve = activation_bytes(config, prefill_graphs.MOST_TOKENS, torch.bfloat16)
        state = runtime.initial_state(1)
        size = sum(tensor.nbytes for tensor in state.tensors)  # type: ignore[attr-defined]
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for tokens in (16, 64, 128, 192, 320, 512, 768, 1024, 1472, 2048):
            lengths = torch.tensor([tokens], dtype=torch.int32)
            for _ in range(2):
                runtime.prefill(torch.ones(1, tokens, dtype=torch.int64), lengths, torch.tensor([0]), state)
        assert len(graphs(runtime)._graphs) == 10
        torch.cuda.empty_cache()
        # Graphs of their own would take 3.2 times the largest's. What is small comes from segments of 2 MiB, logits
        # and workspaces (32 MiB each on Hopper) among them.
        assert torch.cuda.memory_reserved() - before < reserve + 2 * size + 100 * 2**20

    def test_work_that_cannot_be_captured_is_told_once_and_runs_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model(torch.float32)
        runtime, eager = TorchRuntime(model), TorchRuntime(model, capture=None)

        def waiting(*arguments: Any) -> Any:
            torch.cuda.synchronize()
            return prefill(*arguments)

        monkeypatch.setattr(prefill_graphs, "prefill", waiting)
        stream = torch.cuda.current_stream()
        first = read(runtime, [30])
        with pytest.warns(UserWarning, match="found no way to capture it as a CUDA graph") as caught:
            assert_equal(runtime, read(runtime, [30]), first)
        assert "\n" not in str(caught[0].message)
        assert_equal(runtime, read(runtime, [30]), first)
        monkeypatch.undo()
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
        assert torch.randn(3, device="cuda").isfinite().all()
        # What failed harms no graph that is made later.
        found, wanted = (
            one.decode(torch.tensor([[7]]), torch.tensor([30]), read(one, [30])[1])[0] for one in (runtime, eager)
        )
        assert error(found, wanted) < 5e-6


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())
