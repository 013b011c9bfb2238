"""What `tnllm bench` prints and writes."""

import json

QUICK = ("--device", "cpu", "--prompt-lengths", "3", "--contexts", "5,9", "--batches", "1,2", "--tokens", "3",
         "--time-limit", "200", "--threads", "1")  # fmt: skip


def test_it_prints_tables_and_writes_a_page(tnllm, text_bundle, tmp_path):
    result = tnllm("bench", text_bundle.path, "--runtime", "onnxruntime", *QUICK, "-o", tmp_path / "bench.html")
    assert result.exit_code == 0, result.stderr
    for words in ("Time to the first token", "Decode over context", "Decode over batch", "of roofline", "pass"):
        assert words in result.stdout
    assert str(tmp_path / "bench.html") in result.stdout
    assert (tmp_path / "bench.html").read_text().startswith("<!DOCTYPE html>")


def test_it_gives_one_json_document_and_times_all_that_run_here(tnllm, text_bundle):
    result = tnllm("bench", text_bundle.path, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    results = {item["runtime"]: item for item in json.loads(result.stdout)["results"]}
    for name in ("torch", "onnxruntime"):
        assert [row["note"] for row in results[name]["rows"]] == [""] * 6


def test_a_runtime_that_differs_is_in_the_report_and_in_the_exit_code(tnllm, text_bundle, monkeypatch):
    from tnllm_export.runtime.onnxruntime import OnnxRuntime

    honest = OnnxRuntime.decode

    def decode(self, *arguments):
        logits, state = honest(self, *arguments)
        return logits * 1.001, state

    monkeypatch.setattr(OnnxRuntime, "decode", decode)
    result = tnllm("bench", text_bundle.path, "--runtime", "onnxruntime", *QUICK, "--json")
    assert result.exit_code == 60
    document = json.loads(result.stdout)
    assert document["error"]["exit_code"] == 60
    assert document["results"][0]["rows"] == []


def test_no_runtime_to_time_has_an_exit_code_of_its_own(tnllm, text_bundle):
    result = tnllm("bench", text_bundle.path, "--runtime", "tensorrt", *QUICK)
    assert result.exit_code == 40
    assert "does not run on device 'cpu'" in result.stdout
    assert result.stderr.startswith("error: no runtime could be timed on cpu: tensorrt: ")
    assert result.stderr.count("\n") == 1
