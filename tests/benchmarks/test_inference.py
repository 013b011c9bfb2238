"""The inference benchmark: parity goes first, every part gives its records, the Transformer beside is a right one."""

from dataclasses import replace

import pytest
import torch

from benchmarks import inference, inference_models, inference_parity, inference_plan, names
from benchmarks.inference_plan import SIZES, Plan, Size
from benchmarks.llama import LlamaSize, rotate
from benchmarks.llama_decode import LlamaDecoder, attention_forms, before_attention, rope
from tests.tnllm_export.runtime.fake_graphs import captured_on_the_cpu
from tnllm_export.kernels.lightning_attention import op
from tnllm_export.models.config import TransnormerConfig

SMALL = Size(
    "tiny",
    TransnormerConfig(vocab_size=50, decoder_embed_dim=32, decoder_layers=2, decoder_attention_heads=2, glu_dim=48),
    LlamaSize(width=32, layers=2, heads=2, glu_width=64, vocab_size=50),
)
TINY = Plan(
    sizes=(SMALL,), parity=SMALL, parity_tokens=(9, 3), batches=(1, 3), contexts=(16, 64), generated=8, piece=24,
    prompts=(5, 30), device="cpu", capture=captured_on_the_cpu, kernels="pytorch", compiled=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def records():
    return list(inference.run(plan=TINY))


def by_case(records, name):
    return {(record.case, record.peer): record for record in records if record.name == name}


def test_every_part_gives_its_records(records):
    assert not [record for record in records if record.peer and "absent" in record.peer]
    found = by_case(records, names.INFERENCE)
    for batch in (1, 3):
        for peer in (None, names.UNCAPTURED, names.PYTORCH):
            assert found[f"tiny | decode, B {batch}, host included", peer].value > 0
        assert found[f"tiny | decode, B {batch}, graph only", None].floor > 0
        assert found[f"tiny | decode, B {batch}, generation", None].value > 0
    assert found["tiny | decode at 64 tokens of context, graph only", "at 16 tokens"].peer_value > 0
    assert found["tiny | prompt of 30 tokens", None].value > 0
    assert {record.case for record in records if record.name == names.INFERENCE_CONTEXT} == {"tiny | 16", "tiny | 64"}
    assert {record.peer for record in records if record.name == names.INFERENCE_ATTENTION} == {
        "SDPA",
        "matrix products",
    }


def test_rates_and_floors_are_those_of_the_shape(records):
    matrices, states = 2 * (5 * 32**2 + 3 * 32 * 48), 2 * 16 * (32 + 16)
    flops = inference_plan.prefill_flops(SMALL.config, 24)
    assert flops == 24 * (2 * matrices + 4 * states) + 2 * 50 * 32
    assert inference_plan.state_bytes(SMALL.config, 3) == 3 * 4 * states
    metrics = {record.metric: record for record in records if record.case == "tiny | prefill of 24 tokens"}
    assert metrics["rate"].value * metrics["time"].value == pytest.approx(flops / 1e9)
    assert metrics["rate"].floor * metrics["time"].floor == pytest.approx(flops / 1e9)


def test_nothing_is_timed_where_parity_fails(monkeypatch):
    wrong = op.lightning_attention_step_in_place
    monkeypatch.setattr(
        "tnllm_export.models.modeling.lightning_attention_step_in_place",
        lambda *arguments: wrong(*arguments).flip(-1),
    )
    found = []
    with pytest.raises(ArithmeticError, match="distances from float32"):
        found.extend(inference.run(plan=TINY))
    assert not [record for record in found if record.name == names.INFERENCE]


def test_a_batch_that_is_wrong_is_not_timed(monkeypatch):
    right = inference_parity.distances

    def distances(exact, half, batch, plan):
        return right(exact, half, batch, plan) if batch == 1 else iter([("last of 9 tokens", (0.5, 0.1))])

    monkeypatch.setattr(inference_parity, "distances", distances)
    found = list(inference.run(plan=replace(TINY, limit_s=-1)))
    assert next(r for r in found if r.case.startswith("tiny shape, 2 layers, B 3")).value == 0.5
    parity = inference_parity.parity_records(TINY)
    for _ in range(3):
        next(parity)
    with pytest.raises(StopIteration) as stopped:
        next(parity)
    assert stopped.value.value == (1,)


def test_a_generation_whose_tokens_are_wrong_is_not_timed(monkeypatch):
    honest = torch.max
    monkeypatch.setattr(torch, "max", lambda logits, *arguments, **named: honest(-logits, *arguments, **named))
    model = inference_models.random_model(SMALL.config, torch.bfloat16, "cpu")
    with torch.no_grad(), pytest.raises(ArithmeticError, match=r"tiny \| decode, B 1, generation: steps ahead"):
        list(inference.decode_records(SMALL, model, TINY))


def test_without_time_the_parts_are_left_out():
    found = [record for record in inference.run(plan=replace(TINY, limit_s=-1)) if record.name == names.INFERENCE]
    assert len(found) == 4
    assert all("no time left" in record.peer for record in found)


def test_a_model_that_does_not_compile_in_time_is_absent_with_a_reason(monkeypatch):
    def slow(model, batch, plan):
        inference.time.sleep(5)

    monkeypatch.setattr(inference, "compiled_step", slow)
    plan = replace(TINY, compile_s=0.2)
    case = "tiny | decode, B 1, host included"
    record, *_ = inference.compiled_records(SMALL, plan, {case: (1.0, 0.5)}, inference.time.monotonic() + 60)
    assert (record.case, record.value, record.floor) == (case, 1.0, 0.5)
    assert "absent: TimeoutError: not ready after 0 s" in record.peer


def test_the_program_for_compilers_keeps_its_state():
    model = inference_models.random_model(SMALL.config, torch.float32, "cpu")
    program, state = inference_models.InPlace(model, 2), model.initial_state(2)
    with torch.no_grad():
        for token in range(3):
            ids, positions = torch.full((2, 1), token), torch.full((2,), token)
            expected, state = model.decode(ids, positions, state)
            torch.testing.assert_close(program(ids, positions), expected)


def test_sizes_are_those_of_the_release_and_the_transformers_are_as_large():
    for size, parameters in zip(SIZES, (6_836_719_616, 1_020_266_496), strict=True):
        with torch.device("meta"):
            ours = inference_models.TransnormerForCausalLM(size.config)
            theirs = inference_models.Llama(size.llama)
        assert sum(x.numel() for x in ours.parameters()) == parameters
        assert sum(x.numel() for x in theirs.parameters()) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", attention_forms("cpu"))
def test_the_transformers_token_is_the_last_of_its_whole_forward(name):
    torch.manual_seed(0)
    size = LlamaSize(width=32, layers=2, heads=2, glu_width=48, vocab_size=50)
    model = inference_models.random_llama(size, torch.float32, "cpu")
    ids = torch.randint(50, (2, 9))
    decoder = LlamaDecoder(model, size, 2, 9, attention_forms("cpu")[name], compiled=False)
    cos, sin = rope(9, 16, ids.device)
    with torch.no_grad():
        x = model.embed_tokens(ids)
        for layer, cache in zip(model.layers, decoder.cache, strict=True):
            _, k, v = before_attention(layer, x, cos, sin)
            cache[0, :, :, :8], cache[1, :, :, :8] = k[:, :, :8], v[:, :, :8]
            x = layer(x, cos, sin)
        expected = model(ids)[:, -1] @ model.embed_tokens.weight.T
        torch.testing.assert_close(decoder.decode(ids[:, -1:]), expected, rtol=1e-4, atol=1e-5)
    assert rotate(k, cos, sin).shape == k.shape
