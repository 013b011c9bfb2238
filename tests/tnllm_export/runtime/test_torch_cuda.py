"""The PyTorch model on a GPU: it is verified, its graphs answer as eager steps do, and its memory ends in one line."""

import copy

import pytest
import torch
from torch import Tensor

from tnllm_export.bundle import DTYPES, Bundle
from tnllm_export.demo import checkpoint_folder
from tnllm_export.errors import DeviceMemoryError
from tnllm_export.generate import Generator, SamplingParams
from tnllm_export.models.checkpoint import load_model, open_checkpoint
from tnllm_export.models.fused_decode import FusedDecoder
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.models.tokenizer import load_tokenizer
from tnllm_export.runtime import TorchRuntime, load_runtime
from tnllm_export.verify import Workload, verify_runtime
from tnllm_export.verify.cases import SAMPLE_TEXT

pytestmark = pytest.mark.gpu

ACTIVATIONS = ("float32", "bfloat16", "float16")


def demo_model(dtype: str, device: str) -> TransnormerForCausalLM:
    model: TransnormerForCausalLM = load_model(open_checkpoint(checkpoint_folder()), DTYPES[dtype]).to(device)
    return model


def demo_ids() -> list[int]:
    return load_tokenizer(checkpoint_folder() / "tokenizer.model", 4096).encode(SAMPLE_TEXT)


def decode_all(runtime: TorchRuntime, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Feed [B, T] one by one; return logits [B, T, vocab] and the state, on the host."""
    state = runtime.initial_state(len(input_ids))
    logits = []
    for t in range(input_ids.shape[1]):
        answer, state = runtime.decode(input_ids[:, t : t + 1], torch.full((len(input_ids),), t), state)
        logits.append(answer.cpu())
    return torch.stack(logits, 1), runtime.host_state(state)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_the_demo_checkpoint_is_verified_over_256_greedy_tokens(dtype: str) -> None:
    report = verify_runtime(
        TorchRuntime(demo_model(dtype, "cuda")),
        TorchRuntime(demo_model(dtype, "cpu")),
        exact=None if dtype == "float32" else TorchRuntime(demo_model("float32", "cpu")),
        text_ids=demo_ids(),
        seed=3,
        workload=Workload(greedy=256),
    )
    report.require_pass()
    assert report.passed


@pytest.mark.parametrize("batch", [1, 3, 9, 40])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_captured_steps_are_as_exact_as_eager_ones(dtype: str, batch: int) -> None:
    ids = torch.randint(4096, (batch, 40), generator=torch.Generator().manual_seed(batch))
    model = demo_model(dtype, "cuda")
    exact = decode_all(TorchRuntime(demo_model(dtype, "cpu").cast_weights(torch.float64)), ids)
    eager = decode_all(TorchRuntime(model, capture=None), ids)
    captured = decode_all(TorchRuntime(model), ids)
    # Float32 sums in another order; both halves are rounded as often.
    room, least = (4, 2e-6) if dtype == "float32" else (1.2, 0)
    assert error(captured[0], exact[0]) <= max(room * error(eager[0], exact[0]), least)
    for found, other, wanted in zip(captured[1], eager[1], exact[1], strict=True):
        assert error(found, wanted) <= max(room * error(other, wanted), least)


def test_a_graph_of_the_models_own_step_answers_as_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedDecoder, "unsupported", staticmethod(lambda *arguments: "not asked for"))
    model = demo_model("float32", "cuda")
    ids = torch.randint(4096, (4, 30), generator=torch.Generator().manual_seed(1))
    found, expected = decode_all(TorchRuntime(model), ids), decode_all(TorchRuntime(model, capture=None), ids)
    assert error(found[0], expected[0]) < 2e-6
    for one, other in zip(found[1], expected[1], strict=True):
        assert error(one, other) < 2e-6


def test_texts_of_a_batch_that_ends_row_by_row_are_those_of_the_cpu() -> None:
    texts = []
    for device in ("cpu", "cuda"):
        generator = Generator(TorchRuntime(demo_model("float32", device)), prefill_chunk=16)
        params = [SamplingParams(max_new_tokens=count, stop_at_eos=False) for count in (3, 60, 20, 41, 8)]
        prompts = [demo_ids()[start : start + 30] for start in range(5)]
        made = generator.generate(prompts, params, keep_sessions=True)
        more = generator.generate(
            [[], [5, 6], []], SamplingParams(max_new_tokens=5), sessions=[made[0].session, None, made[3].session]
        )
        texts.append([generation.token_ids for generation in (*made, *more)])
    assert texts[0] == texts[1]


def test_a_bundle_runs_on_the_gpu(bundle: Bundle, model: TransnormerForCausalLM) -> None:
    runtime = load_runtime(bundle, "torch", device="cuda")
    assert isinstance(runtime, TorchRuntime)
    assert runtime.info.device == "cuda"
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = decode_all(TorchRuntime(copy.deepcopy(model).to(torch.float64)), ids)
    assert error(decode_all(runtime, ids)[0], expected[0]) < 2e-6


def test_inputs_on_the_gpu_answer_as_those_of_the_host() -> None:
    runtime = TorchRuntime(demo_model("float32", "cuda"))
    logits = []
    for device in ("cpu", "cuda"):
        state = runtime.initial_state(3)
        for t in range(3):
            answer, state = runtime.decode(
                torch.tensor([[5], [6 + t], [7]], device=device), torch.full((3,), t, device=device), state
            )
        logits.append(answer)
    assert torch.equal(*logits)


def test_steps_that_are_not_waited_for_get_their_own_inputs() -> None:
    runtime = TorchRuntime(demo_model("float32", "cuda"))
    ids = torch.randint(4096, (1, 200), generator=torch.Generator().manual_seed(2))
    expected, _ = decode_all(runtime, ids)
    state, answers = runtime.initial_state(1), []
    for t in range(200):
        answer, state = runtime.decode(ids[:, t : t + 1], torch.tensor([t]), state)
        answers.append(answer)
    assert torch.equal(torch.stack(answers, 1).cpu(), expected)


def test_a_state_that_does_not_fit_is_refused_in_one_line() -> None:
    runtime = TorchRuntime(demo_model("float32", "cuda"))
    with pytest.raises(DeviceMemoryError) as caught:
        runtime.initial_state(50_000_000)
    text = str(caught.value)
    assert "\n" not in text
    assert "asked for" in text
    assert "take fewer at once" in text


def test_memory_that_ends_at_capture_leaves_the_state_usable() -> None:
    runtime = TorchRuntime(demo_model("float32", "cuda"))
    ids, positions = torch.full((256, 1), 5), torch.zeros(256, dtype=torch.int64)
    state = runtime.initial_state(256)
    before = runtime.host_state(state)
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(used)
    try:
        with pytest.raises(DeviceMemoryError) as caught:
            runtime.decode(ids, positions, state)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "decode fewer sequences at once" in str(caught.value)
    assert all(torch.equal(one, other) for one, other in zip(runtime.host_state(state), before, strict=True))
    logits, _ = runtime.decode(ids, positions, state)
    assert logits.isfinite().all()
