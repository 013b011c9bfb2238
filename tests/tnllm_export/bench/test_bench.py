"""What is measured, in which order, and what happens to a runtime that can't be."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

import tnllm_export.demo
from tests.tnllm_export.runtime.fake_graphs import captured_on_the_cpu
from tnllm_export import api
from tnllm_export.bench import BenchOptions, bench_bundle, ceilings
from tnllm_export.bench.ceilings import measure_ceilings
from tnllm_export.bench.gate import check_parity, compute_truth
from tnllm_export.bench.measure import Bench
from tnllm_export.bench.memory import ResidentMeter
from tnllm_export.bench.records import Ceilings, Row
from tnllm_export.bench.roofline import state_bytes, work_of
from tnllm_export.bench.timing import summarize, time_calls
from tnllm_export.errors import (
    DeviceMemoryError,
    ParityError,
    RequestError,
    RuntimeMissingError,
    RuntimeTargetError,
    UnsupportedTargetError,
)
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.progress import silent
from tnllm_export.runtime import TorchRuntime, load_runtime

CPU = torch.device("cpu")
SHIPPED = Path(tnllm_export.demo.__file__).parent / "checkpoint"
ONE = BenchOptions(prompt_lengths=(3,), contexts=(5,), batches=(1,), tokens=3, time_limit=10)


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_case_is_measured_on_each_runtime_that_runs(report):
    by_name = {result.runtime: result for result in report.results}
    assert by_name.keys() == {"torch", "onnxruntime", "tensorrt-rtx"}
    for name in ("torch", "onnxruntime"):
        result = by_name[name]
        assert result.error == ""
        assert result.parity.passed
        assert result.parity.logits <= result.parity.limit
        cases = [(row.program, row.batch, row.tokens) for row in result.rows]
        assert cases == [
            ("prefill", 1, 3),
            ("prefill", 1, 70),
            ("decode", 1, 5),
            ("decode", 1, 100),
            ("decode", 1, 5000),
            ("decode", 3, 5),
            ("generate", 1, 5),
            ("generate", 3, 5),
        ]
        for row in result.rows:
            assert row.note == ""
            assert 0 < row.times.p10 <= row.times.median <= row.times.p90
            assert row.times.calls >= 3
            assert row.of_roofline == pytest.approx(row.floor / row.times.median)
    assert by_name["torch"].lowering is None
    assert by_name["onnxruntime"].lowering == "contrib"
    assert report.timed == (by_name["torch"], by_name["onnxruntime"])
    report.require_results()


def test_a_runtime_that_does_not_run_here_is_listed_with_its_reason(report):
    refused = report.results[-1]
    assert "does not run on device 'cpu'" in refused.error
    assert refused.parity is None
    assert refused.rows == ()


def test_rows_say_how_much_of_a_context_was_fed(report):
    for result in report.timed:
        fed = {row.tokens: row.fed for row in result.rows if row.program == "decode" and row.batch == 1}
        assert fed[5] == 5
        assert all(fed[tokens] in (64, tokens) for tokens in (100, 5000))


def test_the_json_holds_every_figure_in_types_of_its_own(report):
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["schema_version"] == 1
    row, measured = document["results"][0]["rows"][0], report.results[0].rows[0]
    assert row["times"]["median"] == measured.times.median
    assert row["tokens_per_second"] == measured.tokens_per_second
    assert row["of_roofline"] == measured.of_roofline
    assert document["options"]["contexts"] == [5, 100, 5000]


def test_nothing_is_timed_that_differs_from_the_eager_model(text_bundle, monkeypatch):
    from tnllm_export.runtime.onnxruntime import OnnxRuntime

    honest = OnnxRuntime.decode

    def decode(self, *arguments):
        logits, state = honest(self, *arguments)
        return logits * 1.001, state

    monkeypatch.setattr(OnnxRuntime, "decode", decode)
    report = bench_bundle(text_bundle, ("onnxruntime", "torch"), device="cpu", options=ONE)
    wrong, right = report.results
    assert wrong.rows == ()
    assert not wrong.parity.passed
    assert right.rows
    with pytest.raises(ParityError) as caught:
        report.require_results()
    assert one_line(caught).startswith("onnxruntime: onnxruntime (float32, lowering contrib) differs")


def test_nothing_is_timed_that_chooses_other_tokens_ahead(text_bundle, monkeypatch):
    truth = compute_truth(text_bundle, CPU, silent)
    model = load_runtime(text_bundle, "torch").model
    assert check_parity(text_bundle, TorchRuntime(model, capture=captured_on_the_cpu), None, truth, silent).passed
    honest = torch.max
    monkeypatch.setattr(torch, "max", lambda logits, *arguments, **named: honest(-logits, *arguments, **named))
    found = check_parity(text_bundle, TorchRuntime(model, capture=captured_on_the_cpu), None, truth, silent)
    assert not found.passed
    assert found.reason == "torch: steps ahead choose other tokens than calls"


def test_half_precision_is_checked_beside_float32(text_checkpoint, tmp_path):
    bundle = api.export(text_checkpoint, tmp_path / "half", dtype="float16")
    truth = compute_truth(bundle, CPU, silent)
    assert truth.exact is not None
    assert check_parity(bundle, load_runtime(bundle, "onnxruntime"), "matmul", truth, silent).passed


@pytest.mark.parametrize(
    "error",
    [
        DeviceMemoryError("decode: no memory"),
        torch.OutOfMemoryError("no\nmemory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RequestError("too large"),
    ],
)
def test_a_case_that_fails_says_so_and_the_others_go_on(text_bundle, error):
    runtime = load_runtime(text_bundle, "torch")
    honest = runtime.decode

    def decode(input_ids, positions, state):
        if len(input_ids) == 3:
            raise error
        return honest(input_ids, positions, state)

    runtime.decode = decode
    options = dataclasses.replace(ONE, batches=(3, 2))
    rows = Bench(runtime, CPU, Ceilings(1e10, 1e10, "float32"), options, ResidentMeter(), silent).run(10)
    notes = {row.batch: row.note for row in rows if row.program == "decode"}
    assert notes.keys() == {1, 2, 3}
    assert (notes[1], notes[2]) == ("", "")
    assert "memory" in notes[3] or "too large" in notes[3]
    assert "\n" not in notes[3]


def test_the_time_limit_ends_the_timing(text_bundle):
    runtime = load_runtime(text_bundle, "torch")
    bench = Bench(runtime, CPU, Ceilings(1e10, 1e10, "float32"), ONE, ResidentMeter(), silent)
    assert {row.note for row in bench.run(-1.0)} == {"the time limit of 10 s had passed"}


def test_contexts_of_all_cases_together_are_fed_in_the_tenth_of_the_time_that_there_is(text_bundle):
    options = dataclasses.replace(ONE, contexts=(1000, 2000), batches=(1, 4))
    for rate, expected in ((30_000.0, 64), (60_000.0, 1000)):
        bench = Bench(
            load_runtime(text_bundle, "torch"), CPU, Ceilings(1e10, 1e10, "float32"), options, ResidentMeter(), silent
        )
        bench._feeding, bench._prefill_rate = 0.5, rate
        # 0.1 s for each of three cases of decode and two of generation.
        row = Row("generate", 4, 1000, 0, None, 1, 1, 1.0)
        assert bench._fed_before(row) == expected
        assert bench._fed_before(dataclasses.replace(row, program="decode")) == expected


def test_no_runtime_at_all_is_an_error_that_names_each(text_bundle):
    report = bench_bundle(text_bundle, ("tensorrt", "tensorrt-rtx"), device="cpu", options=ONE)
    with pytest.raises(RuntimeTargetError) as caught:
        report.require_results()
    assert "no runtime could be timed on cpu: tensorrt: " in one_line(caught)
    assert "tensorrt-rtx: " in one_line(caught)


def test_unknown_names_are_told_the_known_ones(text_bundle):
    with pytest.raises(RuntimeMissingError, match="unknown runtime 'llama'; expected one of: torch, onnxruntime"):
        bench_bundle(text_bundle, ("llama",), device="cpu")
    with pytest.raises(UnsupportedTargetError, match="device is 'tpu'; expected cpu or cuda"):
        bench_bundle(text_bundle, device="tpu")


def test_a_missing_gpu_is_told(text_bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedTargetError, match="PyTorch finds no CUDA device"):
        bench_bundle(text_bundle, device="cuda")


@pytest.mark.parametrize(
    "field", [{"prompt_lengths": ()}, {"contexts": (0,)}, {"batches": (-1,)}, {"tokens": 0}, {"time_limit": 0.0}]
)
def test_options_out_of_their_range_are_refused(field):
    with pytest.raises(RequestError, match=next(iter(field))):
        BenchOptions(**field)


def test_the_work_of_the_7b_release_is_that_of_its_weights_and_state():
    config = TransnormerConfig(
        vocab_size=64000, decoder_embed_dim=4096, decoder_layers=30, decoder_attention_heads=32, glu_dim=11008
    )
    assert state_bytes(config) == 65_011_712
    step = work_of(config, "bfloat16", 1, 1)
    parameters = 6_836_715_520  # all but theta
    assert step.bytes == 2 * parameters + 2 * 4096 + 2 * 65_011_712
    assert step.flops == 2 * parameters + 4 * 65_011_712 // 4
    prompt = work_of(config, "bfloat16", 1, 8192)
    assert prompt.flops == pytest.approx(8192 * step.flops, rel=0.05)
    assert work_of(config, "bfloat16", 1, 8192, all_logits=True).flops == 8192 * step.flops
    assert step.seconds(Ceilings(4.27e12, 7.9e14, "bfloat16")) == step.bytes / 4.27e12
    assert prompt.seconds(Ceilings(4.27e12, 7.9e14, "bfloat16")) == prompt.flops / 7.9e14


def test_percentiles_are_of_the_sorted_values():
    times = summarize([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (times.median, times.p10, times.p90, times.calls) == (3.0, pytest.approx(1.4), pytest.approx(4.6), 5)


def test_a_deadline_that_has_passed_still_gives_three_calls():
    calls = []
    times = time_calls(lambda: calls.append(1), 50, time.perf_counter() - 1, warm_up=6)
    assert times.calls == 3
    assert len(calls) == 4


def test_ceilings_are_what_the_device_does():
    found = measure_ceilings(CPU, "float32")
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.matmul < 1e14
    assert found.dtype == "float32"


def test_on_a_cpu_the_quicker_of_two_dtypes_is_the_ceiling(monkeypatch):
    monkeypatch.setattr(ceilings, "_product_seconds", lambda width, dtype, device: dtype.itemsize)
    assert measure_ceilings(CPU, "float16").dtype == "float16"
    monkeypatch.setattr(ceilings, "_product_seconds", lambda width, dtype, device: 1 / dtype.itemsize)
    found = measure_ceilings(CPU, "float16")
    assert (found.dtype, found.matmul) == ("float32", 4 * 2 * 1024**3)


@pytest.mark.slow
def test_the_demo_checkpoint_is_timed_on_both_runtimes_of_the_cpu(tmp_path):
    bundle = api.export(SHIPPED, tmp_path / "demo", lowering="hybrid")
    report = api.bench(bundle, ["torch", "onnxruntime"], device="cpu", prompt_lengths=[32], contexts=[32, 10000],
                       batches=[1, 2], tokens=4, output=tmp_path / "demo.html")  # fmt: skip
    report.require_results()
    assert [result.runtime for result in report.timed] == ["torch", "onnxruntime"]
    assert all(row.note == "" for result in report.timed for row in result.rows)
    assert "onnxruntime" in (tmp_path / "demo.html").read_text(encoding="utf-8")


@pytest.mark.gpu
def test_on_a_gpu_both_kinds_of_memory_are_measured(text_bundle):
    report = bench_bundle(text_bundle, ("torch",), device="cuda", options=ONE)
    [result] = report.timed
    assert all(row.memory > 0 for row in result.rows)
    assert result.loaded > 0
    assert report.ceilings.bandwidth > 1e11
