"""The public surface, what importing it costs, and the five calls."""

import subprocess
import sys
import types

import pytest
import torch

import tnllm_export
from tnllm_export import api, errors

PUBLIC = [
    "BenchReport",
    "BuildResult",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "EngineOptions",
    "ExportError",
    "Generation",
    "Generator",
    "Inspection",
    "ParityError",
    "ParityReport",
    "Progress",
    "RequestError",
    "Runtime",
    "RuntimeInfo",
    "RuntimeTargetError",
    "SamplingParams",
    "Session",
    "TnllmError",
    "TnllmWarning",
    "TransnormerConfig",
    "TransnormerForCausalLM",
    "Workload",
    "WriteError",
    "bench",
    "build",
    "build_plugin",
    "export",
    "generate",
    "generator",
    "inspect",
    "load",
    "load_runtime",
    "load_state",
    "open_bundle",
    "save_state",
    "verify",
]

WORKLOAD = api.Workload(lengths=(1, 9), decoded=3, greedy=3, piece=4)


def test_the_public_surface_is_this():
    assert sorted(api.__all__) == PUBLIC
    assert all(hasattr(api, name) for name in api.__all__)
    assert tnllm_export.__all__ == ["__version__"]


def test_every_public_function_and_type_is_documented():
    for name in api.__all__:
        thing = getattr(api, name)
        assert not isinstance(thing, types.ModuleType)
        assert (thing.__doc__ or "").strip(), name


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("tnllm_export", {"torch", "onnx", "onnxruntime", "matplotlib", "numpy"}),
        ("tnllm_export.cli.main", {"torch", "onnx", "onnxruntime", "matplotlib", "numpy"}),
        ("tnllm_export.api", {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib", "tokenizers"}),
    ],
)
def test_importing_is_quick(module, forbidden):
    script = f"import sys, {module}; print(*({forbidden!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert found == []


def exit_codes(kind=errors.TnllmError):
    own = {kind.__name__: kind.exit_code}
    return own | {name: code for child in kind.__subclasses__() for name, code in exit_codes(child).items()}


# Wrong usage, a bug, input and output, Ctrl-C, a closed pipe: the command line's own.
RESERVED = {0, 2, 70, 74, 130, 141}


def test_every_error_has_an_exit_code_of_its_own():
    codes = exit_codes()
    assert len(codes) > 25
    assert len(set(codes.values())) == len(codes)
    assert [name for name, code in codes.items() if code in RESERVED] == []


def test_five_calls_do_what_the_command_line_does(text_checkpoint, tmp_path):
    model = api.load(text_checkpoint)
    bundle = api.export(text_checkpoint, tmp_path / "bundle")
    report = api.verify(bundle, workload=WORKLOAD)
    runtime = api.load_runtime(bundle)
    generation = api.generate(bundle, "The captain", runtime=runtime, max_new_tokens=5)

    assert isinstance(model, api.TransnormerForCausalLM)
    assert report.passed
    assert {item.case for item in report.logits} == {"random", "text"}
    assert len(generation.token_ids) == 5
    # Greedy text of the runtime is that of the model that was loaded.
    ids = list(generation.prompt_ids)
    for token in generation.token_ids:
        logits, _ = model(torch.tensor([ids]), logits="last")
        assert token == logits.argmax().item()
        ids.append(token)


def test_every_path_may_be_text(text_checkpoint, tmp_path):
    checkpoint, folder, state = str(text_checkpoint), str(tmp_path / "bundle"), str(tmp_path / "state")
    assert api.load(checkpoint).config == api.export(checkpoint, folder).manifest.config
    opened = api.open_bundle(folder)
    assert opened == api.open_bundle(tmp_path / "bundle")
    assert opened.weights_path.is_file()
    assert api.inspect(folder).kind == "bundle"
    assert api.verify(folder, checkpoint=checkpoint, workload=WORKLOAD).passed
    [done] = api.generator(folder).generate("He", api.SamplingParams(max_new_tokens=1), keep_sessions=True)
    api.save_state(state, done.session, api.load_runtime(folder))
    assert api.load_state(state, api.load_runtime(folder)).token_ids == done.session.token_ids


def test_a_runtime_of_another_bundle_is_refused(text_checkpoint, text_bundle, tmp_path):
    other = api.export(text_checkpoint, tmp_path / "half", dtype="bfloat16")
    runtime = api.load_runtime(text_bundle)
    with pytest.raises(errors.RequestError, match=r"the runtime onnxruntime was loaded from other weights than those"):
        api.generate(other, "The captain", runtime=runtime)


def test_verify_keeps_its_report_in_the_bundle(text_bundle):
    report = api.verify(text_bundle, seed=5, workload=WORKLOAD)
    reopened = api.open_bundle(text_bundle.path)
    assert reopened.manifest.parity is not None
    assert reopened.manifest.parity["passed"] is True
    assert reopened.manifest.parity["seed"] == report.seed == 5
    assert {"reports/parity.json", "reports/parity.html"} <= reopened.manifest.files.keys()


def test_verify_refuses_an_empty_text_before_anything_is_loaded(text_bundle, monkeypatch):
    monkeypatch.setattr("tnllm_export.verify.bundle.load_runtime", None)
    with pytest.raises(api.RequestError, match="the given text has 0 tokens"):
        api.verify(text_bundle, text="", workload=WORKLOAD)


def test_verify_takes_the_truth_from_the_checkpoint_on_request(text_checkpoint, text_bundle, tmp_path):
    def verify(checkpoint):
        return api.verify(text_bundle, checkpoint=checkpoint, workload=WORKLOAD, save=False)

    assert verify(text_checkpoint).passed
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((text_checkpoint / "config.json").read_bytes())
    weights = load_file(text_checkpoint / "model.safetensors")
    weights["model.layers.1.channel_mixer.l1.weight"] *= 1.01
    save_file(weights, other / "model.safetensors")
    assert not verify(other).passed


def test_half_precision_bundles_pass_beside_float32(text_checkpoint, tmp_path):
    bundle = api.export(text_checkpoint, tmp_path / "bundle", dtype="float16", lowering="matmul")
    report = api.verify(bundle, workload=WORKLOAD, save=False)
    assert report.passed
    assert len(report.yardsticks) == 2


def test_load_refuses_other_dtypes(text_checkpoint):
    assert api.load(text_checkpoint, "bfloat16").lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(api.ConfigError, match="dtype is 'int8'; expected float32"):
        api.load(text_checkpoint, "int8")
