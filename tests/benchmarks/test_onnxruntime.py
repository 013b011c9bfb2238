"""ONNX Runtime's benchmarks, tried on the CPU: parity goes first, every case is timed, tables say what was found."""

from dataclasses import replace

import pytest
import torch

from benchmarks import names, onnxruntime_inference, onnxruntime_lowerings, performance
from benchmarks.inference_plan import Size
from benchmarks.llama import LlamaSize
from benchmarks.onnxruntime_inference import OrtPlan
from benchmarks.onnxruntime_lowerings import LoweringsPlan
from benchmarks.onnxruntime_models import onnxruntime_over, trace
from benchmarks.records import Record
from tests.tnllm_export.runtime.fake_graphs import captured_on_the_cpu
from tnllm_export.models.config import TransnormerConfig

SMALL = Size(
    "tiny",
    TransnormerConfig(vocab_size=50, decoder_embed_dim=32, decoder_layers=3, decoder_attention_heads=2, glu_dim=48),
    LlamaSize(width=32, layers=3, heads=2, glu_width=64, vocab_size=50),
)
BESIDE = OrtPlan(
    sizes=(SMALL,), batches=(1, 3), context=16, prompts=(5, 70), parity_tokens=(9, 3), device="cpu",
    dtype=torch.float32, kernels="pytorch", capture=captured_on_the_cpu,
)  # fmt: skip
FORMS = LoweringsPlan(
    size=SMALL, dtypes=(torch.float32,), prompts=(5, 70), batches=(1, 3), parity_tokens=(9, 3), device="cpu"
)


@pytest.fixture(scope="module")
def beside():
    return list(onnxruntime_inference.run(plan=BESIDE))


@pytest.fixture(scope="module")
def forms():
    return list(onnxruntime_lowerings.run(plan=FORMS))


def test_both_runtimes_are_timed_on_the_same_cases(beside):
    found = {record.case: record for record in beside if record.name == names.ORT_INFERENCE}
    cases = ("decode, B 1", "decode, B 3", "prompt of 5 tokens", "prompt of 70 tokens")
    assert list(found) == [f"tiny | {case}" for case in cases]
    for record in found.values():
        assert record.peer == names.ONNXRUNTIME
        assert min(record.value, record.peer_value, record.floor) > 0


def test_parity_of_both_goes_first(beside):
    first, second = beside[:2]
    assert [record.name for record in (first, second)] == [names.ORT_PARITY] * 2
    assert (first.case, second.case) == (f"tiny | {names.OURS}", f"tiny | {names.ONNXRUNTIME}")
    assert second.value < 1e-5


def test_nothing_is_timed_where_a_runtime_is_wrong(monkeypatch):
    monkeypatch.setattr(onnxruntime_inference, "distance", lambda runtime, *rest: 0.1 * (runtime.info.name != "torch"))
    found = list(onnxruntime_inference.run(plan=BESIDE))
    assert [record.peer for record in found if record.name == names.ORT_INFERENCE] == [
        f"{names.ONNXRUNTIME} (absent: ArithmeticError: {names.ONNXRUNTIME} differ: distances from float32 "
        f"{{'ours': 0.0, '{names.ONNXRUNTIME}': 0.1}}, plain PyTorch's 0.00e+00)"
    ]


def test_every_lowering_is_measured_or_says_why_not(forms):
    for lowering in FORMS.lowerings:
        case = f"tiny float32 | {lowering}"
        found = {(record.case, record.metric): record.value for record in forms if record.case.startswith(case)}
        assert 0 < found[f"{case} | logits", "distance from float32"] < 1e-5
        assert found[f"{case} | prompt of 70 tokens", "time to first token"] > 0
        assert found[f"{case} | decode, B 3", "time per token"] > 0
    broken = list(onnxruntime_lowerings.run(plan=replace(FORMS, lowerings=("standard",))))
    assert "absent: " in broken[-1].peer


def test_weights_are_those_of_the_model():
    from benchmarks.inference_models import random_model

    model = random_model(SMALL.config, torch.float32, "cpu")
    with onnxruntime_over(model, trace(SMALL.config, torch.float32), "hybrid") as runtime:
        ids, positions = torch.tensor([[4]]), torch.zeros(1, dtype=torch.int64)
        before, _ = runtime.decode(ids, positions, runtime.initial_state(1))
        with torch.no_grad():
            model.model.embed_tokens.weight.zero_()
        after, _ = runtime.decode(ids, positions, runtime.initial_state(1))
    assert before.abs().max() > 0
    assert after.abs().max() == 0


def test_the_tables_give_ratios_and_the_quickest_lowering(forms):
    record = Record(names.ORT_INFERENCE, "7B | decode, B 1", "time per token", "ms", 4.0, 3.4, names.ONNXRUNTIME, 8.8)
    table = performance.TABLES[names.ORT_INFERENCE]([record])
    assert "| 7B | decode, B 1 | time per token | 3.400 | 4.000 | 8.800 | 2.2 |" in table
    times = [Record(names.ORT_LOWERINGS, f"1B float16 | {form} | decode, B 1", "time per token", "ms", value)
             for form, value in (("hybrid", 2.0), ("matmul", 2.5))]  # fmt: skip
    table = performance.ONNXRUNTIME_TABLES[names.ORT_LOWERINGS](times)
    assert "| 1B float16 | decode, B 1 | time per token (ms) | **2.00** | 2.50 |" in table
    assert "| tiny float32 | prompt of 70 tokens |" in performance.ONNXRUNTIME_TABLES[names.ORT_LOWERINGS](forms)
