"""Opening a bundle with a runtime, and saying why it can't be."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tnllm_export.bundle import Bundle
from tnllm_export.errors import (
    BundleNotFoundError,
    RequestError,
    RuntimeMissingError,
    RuntimeTargetError,
    UnsupportedTargetError,
)
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import Runtime, TorchRuntime, load_runtime
from tnllm_export.runtime.onnxruntime import OnnxRuntime
from tnllm_export.runtime.support import check_threads, weights_id
from tnllm_export.runtime.torch import model_over
from tnllm_export.targets import TARGETS


def changed(bundle: Bundle, **fields: object) -> Bundle:
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=fields))


def answers(runtime: Runtime, tokens: int = 70) -> list[Tensor]:
    input_ids = torch.randint(97, (2, tokens), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([tokens, tokens // 2], dtype=torch.int32)
    logits, state = runtime.prefill(input_ids, lengths, torch.zeros(2, dtype=torch.int64), runtime.initial_state(2))
    step, state = runtime.decode(input_ids[:, :1], lengths.long(), state)
    return [logits, step, *runtime.host_state(state)]


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_importing_the_package_imports_no_optional_runtime() -> None:
    code = "import sys, tnllm_export.runtime; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_bundle_answers_as_the_model_it_was_made_from(
    bundle: Bundle, model: TransnormerForCausalLM, name: str
) -> None:
    found = answers(load_runtime(bundle.path, name, threads=1))
    for one, expected in zip(found, answers(TorchRuntime(model)), strict=True):
        assert expected.norm() > 0
        assert (one - expected).norm() / expected.norm() < 1e-5


def test_packed_weights_answer_as_mapped_ones(bundle: Bundle) -> None:
    mapped = answers(OnnxRuntime.from_bundle(bundle, threads=1))
    packed = answers(OnnxRuntime.from_bundle(bundle, threads=1, prepack=True))
    for one, expected in zip(packed, mapped, strict=True):
        assert (one - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_info_says_what_is_loaded(bundle: Bundle, name: str) -> None:
    info = load_runtime(bundle, name, threads=1).info
    assert (info.name, info.device, info.dtype, info.logits) == (name, "cpu", "float32", "last")
    assert info.config == bundle.manifest.config
    assert info.weights_id == bundle.manifest.files["weights.safetensors"].sha256


def test_weights_are_known_by_their_checksum_in_whatever_folder_of_the_bundle(bundle: Bundle) -> None:
    [record] = [record for name, record in bundle.manifest.files.items() if name == bundle.manifest.weights]
    moved = changed(bundle, weights="parts/weights.safetensors", files={"parts/weights.safetensors": record})
    assert weights_id(moved) == record.sha256


def test_logits_of_all_tokens_end_with_those_of_the_last(model: TransnormerForCausalLM) -> None:
    input_ids = torch.tensor([[4, 5, 6], [7, 8, 0]])
    arguments = (input_ids, torch.tensor([3, 2], dtype=torch.int32), torch.tensor([0, 0]))
    last, every = TorchRuntime(model), TorchRuntime(model, logits="all")
    expected, _ = last.prefill(*arguments, last.initial_state(2))
    logits, _ = every.prefill(*arguments, every.initial_state(2))
    assert logits.shape == (2, 3, 97)
    torch.testing.assert_close(logits[[0, 1], [2, 1]], expected)


def test_a_float64_model_keeps_float64_states_and_logits() -> None:
    config = TransnormerConfig(
        vocab_size=11, decoder_embed_dim=16, decoder_layers=2, decoder_attention_heads=1, glu_dim=8
    )
    runtime = TorchRuntime(TransnormerForCausalLM(config).cast_weights(torch.float64))
    logits, state = runtime.decode(torch.tensor([[3]]), torch.tensor([0]), runtime.initial_state(1))
    assert runtime.info.dtype == "float64"
    assert {logits.dtype, *(tensor.dtype for tensor in runtime.host_state(state))} == {torch.float64}


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_built_over_the_very_tensors_it_is_given(tied: bool) -> None:
    config = TransnormerConfig(
        vocab_size=11,
        decoder_embed_dim=16,
        decoder_layers=2,
        decoder_attention_heads=1,
        glu_dim=8,
        tie_word_embeddings=tied,
    )
    original = TransnormerForCausalLM(config)
    tensors = {name: tensor for name, tensor in original.state_dict().items() if not tied or name != "lm_head.weight"}
    built = model_over(config, tensors, torch.device("cpu"))
    parameters = dict(built.named_parameters())
    assert parameters.keys() == tensors.keys()
    assert all(parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    torch.testing.assert_close(built(torch.tensor([[1, 2, 3]]))[0], original(torch.tensor([[1, 2, 3]]))[0])


def test_an_unknown_runtime_is_told_the_known_ones(bundle: Bundle) -> None:
    with pytest.raises(RuntimeMissingError) as caught:
        load_runtime(bundle, "tensorflow")
    assert "'tensorflow'; expected one of: onnxruntime, torch, aotinductor, tensorrt-rtx, tensorrt" in one_line(caught)


def test_a_runtime_that_is_not_installed_is_told_how(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError) as caught:
        load_runtime(bundle)
    assert "pip install onnxruntime" in one_line(caught)


def test_a_dtype_that_the_runtime_does_not_run_is_told_the_way_out(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedTargetError) as caught:
        load_runtime(changed(bundle, dtype="bfloat16"))
    text = one_line(caught)
    assert "dtype is bfloat16; onnxruntime on cpu runs float32, float16" in text
    assert "--dtype float32, or load it with the runtime torch" in text


def test_a_lowering_that_the_runtime_does_not_run_is_told_the_way_out(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedTargetError) as caught:
        load_runtime(changed(bundle, lowering="standard"))
    lowerings = next(target.lowerings for target in TARGETS if target.name == "onnxruntime-cpu")
    assert "standard" not in lowerings
    text = one_line(caught)
    assert f"lowering is standard; onnxruntime on cpu runs {', '.join(lowerings)}" in text
    assert f"--lowering {lowerings[0]}" in text


def test_an_opset_that_the_runtime_does_not_know_is_told_the_way_out(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedTargetError) as caught:
        load_runtime(changed(bundle, opset_imports={"": 27}))
    assert "opset is 27; onnxruntime on cpu runs up to 26" in one_line(caught)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_an_unknown_device_is_told_the_known_ones(bundle: Bundle, name: str) -> None:
    with pytest.raises(UnsupportedTargetError) as caught:
        load_runtime(bundle, name, device="tpu")
    assert f"{name} does not run on device 'tpu'; expected one of: cpu" in one_line(caught)


def test_a_gpu_that_is_not_there_is_told_the_way_out(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedTargetError) as caught:
        load_runtime(bundle, "torch", device="cuda")
    text = one_line(caught)
    assert "PyTorch finds no CUDA device" in text
    assert "--device cpu" in text


@pytest.mark.parametrize(("cores", "most"), [(1, 64), (2, 64), (48, 192), (None, 64)])
def test_threads_below_one_or_far_above_the_cores_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, cores: int | None, most: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    for threads in (0, -1, most + 1, 100_000):
        with pytest.raises(RequestError) as caught:
            load_runtime(bundle, threads=threads)
        assert f"threads is {threads}; expected 1 … {most}" in one_line(caught)
    check_threads(None)
    check_threads(1)
    check_threads(most)


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError):
        load_runtime(tmp_path)


def test_a_graph_that_onnxruntime_refuses_is_reported_in_one_line(bundle: Bundle, tmp_path: Path) -> None:
    for file in (bundle.prefill_path, bundle.decode_path):
        (tmp_path / file.name).write_bytes(b"no graph")
    (tmp_path / bundle.weights_path.name).write_bytes(b"")
    with pytest.raises(UnsupportedTargetError) as caught:
        OnnxRuntime.from_bundle(dataclasses.replace(bundle, path=tmp_path))
    assert "refuses the graph" in one_line(caught)


def test_a_failure_inside_onnxruntime_is_reported_in_one_line(bundle: Bundle) -> None:
    class Broken:
        def __init__(self, session: object) -> None:
            self.session = session

        def io_binding(self) -> object:
            return self.session.io_binding()  # type: ignore[attr-defined]

        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError("out of memory\nat some line")

    sound = OnnxRuntime.from_bundle(bundle, threads=1)
    broken = OnnxRuntime(sound.info, sound._prefill, Broken(sound._decode))
    state = broken.initial_state(1)
    with pytest.raises(RuntimeTargetError) as caught:
        broken.decode(torch.tensor([[1]]), torch.tensor([0]), state)
    assert one_line(caught) == "onnxruntime failed: out of memory"
    assert all(not tensor.any() for tensor in broken.host_state(state))
