"""The PyTorch model on a GPU: it is verified, its graphs answer as eager steps do, and its memory ends in one line."""

import copy
from dataclasses import replace

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


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_ahead_give_the_tokens_and_the_state_of_steps_in_turns(dtype: str, batch: int) -> None:
    runtime = TorchRuntime(demo_model(dtype, "cuda"))
    first, positions = torch.arange(5, 5 + batch)[:, None], torch.arange(batch)
    state, ids, expected = runtime.initial_state(batch), first, []
    for t in range(40):
        logits, state = runtime.decode(ids, positions + t, state)
        ids = logits.argmax(-1, keepdim=True).cpu()
        expected.append(ids[:, 0].tolist())
    wanted = runtime.host_state(state)
    step, state = runtime.decode_ahead(first, positions, runtime.initial_state(batch))
    steps = [step]
    for _ in range(39):
        step, state = runtime.decode_ahead(None, None, state)
        steps.append(step)
    assert [work.wait()[0] for work in steps] == expected
    assert all(torch.equal(one, other) for one, other in zip(runtime.host_state(state), wanted, strict=True))
    assert steps[-1].wait()[1] == logits.amax(-1).tolist()
    assert torch.equal(step.logits, logits)


def test_states_that_run_ahead_in_turns_keep_their_next_tokens() -> None:
    runtime = TorchRuntime(demo_model("float32", "cuda"))
    firsts = [torch.tensor([[5], [6]]), torch.tensor([[7], [8]])]
    zeros = torch.zeros(2, dtype=torch.int64)
    found: list[list[list[int]]] = []
    for turns in ([0] * 20 + [1] * 20, [0, 1] * 20):
        tokens: list[list[int]] = [[], []]
        states: list[object] = [None, None]
        for place in turns:
            if states[place] is None:
                step, states[place] = runtime.decode_ahead(firsts[place], zeros, runtime.initial_state(2))
            else:
                step, states[place] = runtime.decode_ahead(None, None, states[place])
            tokens[place].extend(step.wait()[0])
        found.append(tokens)
    assert found[0] == found[1]


def test_a_token_outside_the_vocabulary_that_nobody_has_seen_harms_nothing() -> None:
    runtime = TorchRuntime(demo_model("float32", "cuda"))
    first, zeros = torch.tensor([[5]]), torch.zeros(1, dtype=torch.int64)
    logits = []
    for token in (4095, 10**9):
        _, state = runtime.decode_ahead(first, zeros, runtime.initial_state(1))
        step, _ = runtime.decode_ahead(torch.tensor([[token]], device="cuda"), None, state)
        logits.append(step.logits.clone())
    assert torch.equal(*logits)


SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=11, max_new_tokens=60)


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=60), SAMPLED, replace(SAMPLED, top_k=0)])
def test_a_generator_that_runs_ahead_tells_what_one_in_turns_does(params: SamplingParams) -> None:
    """Stops come where the next step is under way: the sessions kept there go on as if nothing had stopped."""
    runtime = TorchRuntime(demo_model("float32", "cuda"))
    tokenizer = load_tokenizer(checkpoint_folder() / "tokenizer.model", 4096)
    ahead, in_turns = Generator(runtime, tokenizer), Generator(TorchRuntime(demo_model("float32", "cuda")), tokenizer)
    in_turns.runtime._info = replace(runtime.info, runs_ahead=False)  # type: ignore[attr-defined]
    params = replace(params, stop_at_eos=False)
    prompts = [demo_ids()[start : start + 30] for start in range(5)]
    whole = in_turns.generate(prompts, params)
    stopped = [replace(params, stop=(one.text[20 + 3 * place :][:4],)) for place, one in enumerate(whole)]
    parts = [generator.generate(prompts, stopped, keep_sessions=True) for generator in (ahead, in_turns)]
    told = [[(part.token_ids, part.text, part.finish_reason) for part in some] for some in parts]
    assert told[0] == told[1]
    assert "stop" in {part.finish_reason for part in parts[0]}
    rest = ahead.generate(
        [[]] * 5,
        [replace(params, max_new_tokens=max(60 - len(part.token_ids), 0)) for part in parts[0]],
        sessions=[part.session for part in parts[0]],
    )
    joined = [(*part.token_ids, *more.token_ids) for part, more in zip(parts[0], rest, strict=True)]
    assert joined == [one.token_ids for one in whole]


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
