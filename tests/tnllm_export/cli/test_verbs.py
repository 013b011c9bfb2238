"""What each command prints and writes."""

import io
import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tnllm_export.bundle import open_bundle
from tnllm_export.cli.generate import collect_prompts
from tnllm_export.targets import TARGETS
from tnllm_export.verify import Workload


@pytest.fixture(autouse=True)
def quick_workload(monkeypatch):
    """Verify on less."""
    monkeypatch.setattr(Workload.__init__, "__defaults__", ((1, 9), 3, 3, 4))


def test_export_writes_a_bundle_and_says_what_is_in_it(tnllm, text_checkpoint, tmp_path):
    result = tnllm("export", text_checkpoint, "-o", tmp_path / "b", "--lowering", "plugin", "--logits", "all", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    document = json.loads(result.stdout)
    bundle = open_bundle(tmp_path / "b")
    assert document["bundle"] == str(bundle.path)
    assert (document["lowering"], document["logits"], document["dtype"]) == ("plugin", "all", "float32")
    assert bundle.manifest.lowering == "plugin"
    assert document["files"].keys() == bundle.manifest.files.keys()

    again = tnllm("export", text_checkpoint, "-o", tmp_path / "b")
    assert again.exit_code == 22
    assert open_bundle(tmp_path / "b").manifest.lowering == "plugin"


def test_verify_prints_a_table_and_writes_the_page(tnllm, text_bundle):
    result = tnllm("verify", text_bundle.path)
    assert result.exit_code == 0, result.stderr
    assert "PASS" in result.stdout
    assert str(text_bundle.path / "reports" / "parity.html") in result.stdout
    assert (text_bundle.path / "reports" / "parity.html").read_text().startswith("<!DOCTYPE html>")


def test_verify_gives_one_json_document(tnllm, text_bundle, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The captain laughed and gave him a coin, and the boy ran away along the quay.")
    result = tnllm("verify", text_bundle.path, "--json", "--seed", 4, "--text-file", text, "--no-save")
    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert document["seed"] == 4
    assert document["cases"][1]["description"] == "real text: the given text"


def test_a_wrong_runtime_fails_with_its_exit_code_and_a_report(tnllm, text_bundle, monkeypatch):
    from tnllm_export.runtime.onnxruntime import OnnxRuntime

    honest = OnnxRuntime.decode

    def decode(self, *arguments):
        logits, state = honest(self, *arguments)
        return logits * 1.001, state

    monkeypatch.setattr(OnnxRuntime, "decode", decode)
    result = tnllm("verify", text_bundle.path)
    assert result.exit_code == 60
    assert "FAIL" in result.stdout
    assert result.stderr.startswith("error: onnxruntime (float32, lowering contrib) differs from the eager model")
    assert result.stderr.count("\n") == 1

    as_json = json.loads(tnllm("verify", text_bundle.path, "--json").stdout)
    assert as_json["passed"] is False
    assert as_json["error"]["exit_code"] == 60
    assert open_bundle(text_bundle.path).manifest.parity["passed"] is False


def test_generate_streams_text(tnllm, text_bundle):
    options = ("--max-new-tokens", 8)
    result = tnllm("generate", text_bundle.path, "--prompt", "The captain", *options)
    document = json.loads(tnllm("generate", text_bundle.path, "--prompt", "The captain", *options, "--json").stdout)
    [generation] = document["generations"]
    assert result.exit_code == 0, result.stderr
    assert result.stdout == generation["text"] + "\n"
    assert len(generation["token_ids"]) == 8
    assert generation["finish_reason"] == "length"

    eager = tnllm("generate", text_bundle.path, "--prompt", "The captain", *options, "--runtime", "torch")
    assert eager.stdout == result.stdout


def test_generate_writes_a_batch_one_after_the_other(tnllm, text_bundle, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("In the morning all of it")
    prompts = ("--prompt", "The captain", "--prompt-ids", "5, 6 7", "--prompt-file", file)
    result = tnllm("generate", text_bundle.path, *prompts, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if line.startswith("==>")]
    assert heads == ["==> The captain <==", "==> 5 6 7 <==", "==> In the morning all of it <=="]
    alone = tnllm("generate", text_bundle.path, "--prompt-ids", "5,6,7", "--max-new-tokens", 4)
    assert f"==> 5 6 7 <==\n{alone.stdout}" in result.stdout

    from_stdin = tnllm(
        "generate", text_bundle.path, "--prompt-file", "-", "--max-new-tokens", 4, input="In the morning all of it"
    )
    assert result.stdout.endswith(from_stdin.stdout)


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("The captain", "The captain"),
        ("The captain\n", "The captain"),
        ("The captain\r\n", "The captain"),
        ("The captain\n\n", "The captain\n"),
        ("The captain\r\n\r\n", "The captain\n"),
        ("The captain \n", "The captain "),
        ("\nThe captain", "\nThe captain"),
    ],
)
def test_one_final_newline_of_a_file_or_of_stdin_is_no_part_of_the_prompt(tmp_path, monkeypatch, written, taken):
    file = tmp_path / "prompt.txt"
    file.write_bytes(written.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(written.encode())))
    assert collect_prompts([], [], [file, Path("-")], optional=False) == [taken, taken]


def test_a_prompt_of_the_command_line_is_taken_as_it_is():
    assert collect_prompts(["The captain\n"], [], [], optional=False) == ["The captain\n"]


def test_without_a_tokenizer_ids_go_in_and_come_out(tnllm, ids_bundle):
    options = ("--prompt-ids", "5,6", "--max-new-tokens", 3)
    result = tnllm("generate", ids_bundle.path, *options)
    [generation] = json.loads(tnllm("generate", ids_bundle.path, *options, "--json").stdout)["generations"]
    assert [int(token) for token in result.stdout.split()] == generation["token_ids"]
    assert generation["text"] == ""
    verified = json.loads(tnllm("verify", ids_bundle.path, "--json").stdout)
    assert [case["name"] for case in verified["cases"]] == ["random"]


def test_a_saved_state_goes_on_where_it_stopped(tnllm, text_bundle, tmp_path):
    drawn = ("--temperature", 1, "--seed", 3, "--ignore-eos", "--json")
    state = tmp_path / "state"

    def ids(*options):
        result = tnllm("generate", text_bundle.path, *options, *drawn)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["generations"][0]["token_ids"]

    whole = ids("--prompt", "The captain", "--max-new-tokens", 10)
    first = ids("--prompt", "The captain", "--max-new-tokens", 4, "--save-state", state)
    rest = ids("--load-state", state, "--max-new-tokens", 6)
    assert first + rest == whole


def test_a_drawn_text_tells_its_seed(tnllm, text_bundle):
    def run(*options):
        arguments = ("--prompt", "He", "--temperature", 2, "--max-new-tokens", 6, "--json", *options)
        return json.loads(tnllm("generate", text_bundle.path, *arguments).stdout)

    first = run()
    assert run("--seed", first["seed"])["generations"][0]["token_ids"] == first["generations"][0]["token_ids"]


def test_inspect_reads_a_bundle_without_its_weights(tnllm, text_bundle, monkeypatch):
    weights = text_bundle.weights_path
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self), original(self, *a, **k))[1])
    document = json.loads(tnllm("inspect", text_bundle.path, "--json").stdout)
    assert weights not in opened
    assert document["kind"] == "bundle"
    assert document["parameters"] == text_bundle.manifest.source.parameters
    prefill, decode = document["graphs"]
    assert prefill["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "time"]}
    assert decode["outputs"][0] == {"name": "logits", "dtype": "float32", "shape": ["batch", 320]}
    assert {"domain": "com.microsoft", "op": "LinearAttention", "count": 2} in prefill["ops"]
    verdicts = {target["target"]: target["runs"] for target in document["targets"]}
    assert verdicts == {
        "torch-cpu": True,
        "torch-cuda": True,
        "onnxruntime-cpu": True,
        "onnxruntime-cuda": True,
        "aotinductor-cpu": True,
        "aotinductor-cuda": True,
        "tensorrt-rtx": False,
        "tensorrt": False,
    }
    assert document["bytes"] > weights.stat().st_size


def test_inspect_shows_a_graph_for_people(tnllm, text_bundle, tmp_path):
    # Alone: the weights need not be there.
    graph = tmp_path / "decode.onnx"
    graph.write_bytes(text_bundle.decode_path.read_bytes())
    result = tnllm("inspect", graph)
    assert result.exit_code == 0, result.stderr
    for words in ("contrib (by its operators)", "weights.safetensors", "LinearAttention 2", "past_state.1  float32"):
        assert words in result.stdout
    assert "no: runs a bundle's weights, no graphs" in result.stdout


NO_STANDARD = "lowering standard; runs {lowerings}"


def write_graph(path, op, domain, opset, elem_type):
    """One operator with one weight."""
    weight = helper.make_tensor("weight", elem_type, [2, 3], bytes(6 * 2 * (2 if elem_type == 1 else 1)), raw=True)
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "branch", [], [])
    nodes = [
        helper.make_node(op, ["x", "weight"], ["y"], domain=domain),
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch),
    ]
    x = helper.make_tensor_value_info("x", elem_type, ["batch", None, 3])
    graph = helper.make_graph(nodes, "graph", [x], [], [weight])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(domain or "unused", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports), path)


@pytest.mark.parametrize(
    ("op", "domain", "opset", "elem_type", "lowering", "reasons"),
    [
        ("MatMul", "", 20, TensorProto.BFLOAT16, "matmul", ["dtype bfloat16; runs {dtypes}"]),
        ("LinearAttention", "", 27, TensorProto.FLOAT, "standard", [NO_STANDARD, "opset 27; runs up to 26"]),
        ("LinearAttention", "com.microsoft", 20, TensorProto.FLOAT, "contrib", []),
        ("LightningAttention", "tnllm", 20, TensorProto.FLOAT, "plugin", []),
    ],
)  # fmt: skip
def test_inspect_tells_lowering_and_why_a_target_cannot_run_it(
    tnllm, tmp_path, op, domain, opset, elem_type, lowering, reasons
):
    write_graph(tmp_path / "graph.onnx", op, domain, opset, elem_type)
    document = json.loads(tnllm("inspect", tmp_path / "graph.onnx", "--json").stdout)
    target = next(target for target in TARGETS if target.name == "onnxruntime-cpu")
    lists = {"dtypes": ", ".join(target.dtypes), "lowerings": ", ".join(target.lowerings)}
    expected = [reason.format(**lists) for reason in reasons]
    assert document["lowering"] == lowering
    verdicts = {verdict.pop("target"): verdict for verdict in document["targets"]}
    assert verdicts["onnxruntime-cpu"] == {"runs": not expected, "reasons": expected}
    [graph] = document["graphs"]
    assert graph["inputs"][0]["shape"] == ["batch", "?", 3]
    # Both branches of the If count.
    assert {"domain": "ai.onnx", "op": "Neg", "count": 2} in graph["ops"]
    assert (graph["parameters"], graph["weight_bytes"]) == (6, 6 * (4 if elem_type == TensorProto.FLOAT else 2))


def test_the_demo_goes_the_whole_way(tnllm, text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("tnllm_export.demo.checkpoint_folder", lambda: text_checkpoint)
    monkeypatch.chdir(tmp_path)
    result = tnllm("demo", "--max-new-tokens", 5)
    assert result.exit_code == 0, result.stderr
    assert "PASS" in result.stdout
    assert "It was a fine morning in May, and" in result.stdout
    assert "tnllm-demo/reports/parity.html" in result.stdout
    assert open_bundle(tmp_path / "tnllm-demo").manifest.parity["passed"] is True

    # The default folder is made anew, one that was named is not.
    assert tnllm("demo", "-o", tmp_path / "tnllm-demo").exit_code == 22
    again = tnllm("demo", "-o", tmp_path / "tnllm-demo", "--overwrite", "--max-new-tokens", 5, "--json")
    document = json.loads(again.stdout)
    assert document["parity"]["passed"] is True
    assert len(document["generation"]["token_ids"]) == 5
    assert Path(document["report"]).is_file()


def test_train_demo_hands_its_options_on(tnllm, tmp_path, monkeypatch):
    from tnllm_export.demo import Evaluation, TrainingResult

    asked = {}

    def train(corpus, output, *, settings, device, progress):
        asked.update(corpus=corpus, steps=settings.steps, seed=settings.seed, device=device)
        return TrainingResult(output, Evaluation(20.0, 90.0, 2.0, 1000), 1234, 7, 1.5, ())

    monkeypatch.setattr("tnllm_export.demo.train", train)
    options = ("--corpus", tmp_path / "text", "--steps", 9, "--seed", 2, "--device", "cpu", "--json")
    result = tnllm("train-demo", "-o", tmp_path / "out", *options)
    document = json.loads(result.stdout)
    assert asked == {"corpus": tmp_path / "text", "steps": 9, "seed": 2, "device": "cpu"}
    assert document["parameters"] == 1234
    assert document["validation"]["perplexity"] == 20.0
