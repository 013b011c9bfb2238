"""What an export leaves on the disk, in every lowering and dtype."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

from tnllm_export.bundle import open_bundle
from tnllm_export.errors import BundleExistsError, CheckpointNotFoundError, ExportError, TokenizerError
from tnllm_export.export import export_bundle
from tnllm_export.models.config import load_config
from tnllm_export.models.modeling import TransnormerForCausalLM

CHECKPOINT = Path(__file__).parents[2] / "data" / "golden" / "scaled_embedding"


@pytest.fixture(
    scope="module",
    params=[
        ("contrib", "float32"),
        ("standard", "float16"),
        ("matmul", "bfloat16"),
        ("plugin", "bfloat16"),
        ("hybrid", "float16"),
    ],
    ids="-".join,
)
def exported(request, tmp_path_factory):
    lowering, dtype = request.param
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("out") / "bundle", dtype=dtype, lowering=lowering)


def graphs_of(bundle):
    return [onnx.load(path, load_external_data=False) for path in (bundle.prefill_path, bundle.decode_path)]


def test_graphs_pass_the_checker(exported):
    # The full check infers shapes too; it knows no operators of com.microsoft, and leaves them alone.
    for path in (exported.prefill_path, exported.decode_path):
        onnx.checker.check_model(str(path), full_check=True)


def test_every_node_is_named_after_a_module_of_the_model(exported):
    config, _ = load_config(CHECKPOINT)
    modules = {name for name, _ in TransnormerForCausalLM(config).named_modules()}
    for graph in graphs_of(exported):
        names = [node.name for node in graph.graph.node]
        assert len(set(names)) == len(names) > 0
        assert {name.rpartition("/")[0] for name in names} <= modules


def test_no_path_of_the_exporting_machine_is_left_in_a_graph(exported):
    for path in (exported.prefill_path, exported.decode_path, exported.path / "manifest.json"):
        content = path.read_bytes()
        assert str(Path(__file__).parents[3]).encode() not in content
        assert sys.prefix.encode() not in content


def test_weights_are_stored_once_and_torch_loads_them(exported):
    weights = load_file(exported.weights_path)
    config, _ = load_config(CHECKPOINT)
    model = TransnormerForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    assert dtypes.pop("model.layers.0.token_mixer.lrpe.theta") == torch.float32
    assert set(dtypes.values()) == {getattr(torch, exported.manifest.dtype)}
    external = {
        tensor.name for graph in graphs_of(exported) for tensor in graph.graph.initializer if tensor.external_data
    }
    assert external == set(weights)


def test_ports_are_those_of_the_two_programs(exported):
    prefill, decode = exported.manifest.graphs.prefill, exported.manifest.graphs.decode
    past = [f"past_state.{layer}" for layer in range(3)]
    assert [port.name for port in prefill.inputs] == ["input_ids", "lengths", "positions", *past]
    assert [port.name for port in decode.inputs] == ["input_ids", "positions", *past]
    assert prefill.inputs[0].shape == ("batch", "time")
    assert decode.inputs[0].shape == ("batch", 1)
    assert {port.dtype for port in (*prefill.outputs, *decode.outputs)} == {"float32"}
    assert prefill.outputs[0].shape == decode.outputs[0].shape == ("batch", 97)


def test_no_graph_loops_over_tokens(exported):
    for graph in graphs_of(exported):
        bodies = [graph.graph.node, *(function.node for function in graph.functions)]
        assert not {node.op_type for body in bodies for node in body} & {"Loop", "Scan", "If", "SequenceAt"}


def test_the_same_checkpoint_exports_to_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        export_bundle(CHECKPOINT, tmp_path / name, lowering="matmul")
    one, two = open_bundle(tmp_path / "one"), open_bundle(tmp_path / "two")
    assert one.manifest.files == two.manifest.files


def test_defaults_are_what_onnx_runtime_on_the_cpu_prefers(tmp_path):
    manifest = export_bundle(CHECKPOINT, tmp_path / "bundle").manifest
    assert (manifest.dtype, manifest.lowering, manifest.logits) == ("float32", "matmul", "last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; expected one of float32, float16, bfloat16"),
        ({"lowering": "loop"}, "lowering is 'loop'; expected one of contrib, standard, matmul, plugin, hybrid"),
        ({"logits": "some"}, "logits is 'some'; expected one of last, all"),
    ],
)
def test_unknown_options_are_named(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_bundle(CHECKPOINT, tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_afterwards_as_it_was_before(tmp_path, collecting):
    try:
        (gc.enable if collecting else gc.disable)()
        with pytest.raises(CheckpointNotFoundError):
            export_bundle(tmp_path / "nothing", tmp_path / "bundle")
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


def test_an_output_that_exists_is_refused_before_any_work_and_kept(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BundleExistsError):
            export_bundle(tmp_path / "no checkpoint", tmp_path / "bundle", overwrite=overwrite)
    assert (tmp_path / "bundle" / "thesis.tex").read_text() == "years of work"


def test_a_failed_overwrite_keeps_the_old_bundle(tmp_path):
    export_bundle(CHECKPOINT, tmp_path / "bundle", lowering="contrib")
    with pytest.raises(CheckpointNotFoundError):
        export_bundle(tmp_path / "nothing", tmp_path / "bundle", overwrite=True)
    assert open_bundle(tmp_path / "bundle").manifest.lowering == "contrib"


def test_a_broken_tokenizer_is_found_before_anything_is_written(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).write_bytes((CHECKPOINT / name).read_bytes())
    (checkpoint / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(TokenizerError):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_killed_export_leaves_no_bundle_and_the_next_one_works(tmp_path):
    script = (
        "import sys, time, pathlib; from tnllm_export.export import export_bundle\n"
        "def hang(stage, done, total, unit=''):\n"
        "    if stage == 'writing weights' and done > total / 2: print('half', flush=True); time.sleep(60)\n"
        "export_bundle(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), progress=hang)\n"
    )
    output = tmp_path / "bundle"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(CHECKPOINT), str(output)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    assert [path.name.startswith(".bundle.partial-") for path in tmp_path.iterdir()] == [True]
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{process.pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    export_bundle(CHECKPOINT, output)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(output).manifest.parity is None
