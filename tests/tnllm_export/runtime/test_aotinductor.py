"""AOTInductor packages: what is in them, what they are refused for, and that they read the bundle's weights."""

import gc
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._inductor import config as inductor_config

from tnllm_export import inspection
from tnllm_export.build import EngineOptions, build_engines
from tnllm_export.build.aotinductor_programs import ProgramTracer
from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.bundle.engines import EngineRecord, EngineSet, engines_of, host_device
from tnllm_export.demo import checkpoint_folder
from tnllm_export.errors import (
    DeviceMemoryError,
    EngineBuildError,
    EngineMismatchError,
    EngineMissingError,
    RuntimeTargetError,
    StateError,
    UnsupportedTargetError,
)
from tnllm_export.export import export_bundle
from tnllm_export.runtime import Runtime, aotinductor, device_memory, load_runtime
from tnllm_export.runtime.aotinductor import Package, check_fits
from tnllm_export.runtime.aotinductor_constants import free_memory
from tnllm_export.verify import verify_bundle

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CPU = EngineOptions(device="cpu")


@pytest.fixture
def own(packaged, tmp_path) -> Bundle:
    """A copy of the bundle with packages for the CPU, to change."""
    return open_bundle(Path(shutil.copytree(packaged("cpu").path, tmp_path / "own")))


def one_line(caught) -> str:
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def packages_of(bundle: Bundle) -> EngineSet:
    (found,) = engines_of(bundle.path)
    return found


def first_token(runtime: Runtime) -> torch.Tensor:
    lengths, positions = torch.tensor([3], dtype=torch.int32), torch.tensor([0])
    return runtime.prefill(torch.tensor([[5, 6, 7]]), lengths, positions, runtime.initial_state(1))[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 2), (2, 63), (5, 64), (2, 65), (1, 449), (1, 1100)])
def test_any_batch_and_any_prompt_answer_as_the_model(packaged, device, B, T):
    bundle = packaged(device)
    generator = torch.Generator().manual_seed(B * T)
    input_ids = torch.randint(97, (B, T), generator=generator)
    lengths = torch.randint(1, T + 1, (B,), generator=generator, dtype=torch.int32)
    token = torch.randint(97, (B, 1), generator=generator)
    answers = []
    for runtime in (load_runtime(bundle, "aotinductor", device=device), load_runtime(bundle, "torch", device="cpu")):
        state = runtime.initial_state(B)
        logits, state = runtime.prefill(input_ids, lengths, torch.zeros(B, dtype=torch.int64), state)
        following, state = runtime.decode(token, lengths.long(), state)
        answers.append((logits.cpu(), following.cpu(), *runtime.host_state(state)))
    for found, expected in zip(*answers, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() < 5e-6 * expected.norm()


def test_packages_hold_no_weights_and_are_listed(packaged):
    bundle = packaged("cpu")
    with torch.no_grad():
        weights = load_file(bundle.weights_path)["model.embed_tokens.weight"].numpy().tobytes()
    packages = packages_of(bundle)
    assert set(packages.record.files) == {"prefill.pt2", "decode.pt2", "constants.safetensors"}
    for name in packages.record.files:
        assert weights[:64] not in (packages.path / name).read_bytes()
    (listed,) = inspection.inspect(bundle.path).engines
    assert (listed.target, listed.version, listed.gpus) == ("aotinductor", torch.__version__, host_device())
    assert (listed.weights, listed.profile, listed.current) == ("external", None, True)
    (alone,) = inspection.inspect(packages.path / "decode.pt2").engines
    assert alone.files == listed.files


def test_other_weights_answer_otherwise_without_a_build(own):
    before = first_token(load_runtime(own, "aotinductor", device="cpu"))
    weights = load_file(own.weights_path)
    name = "model.layers.1.token_mixer.out_proj.weight"
    save_file(weights | {name: -weights[name]}, own.weights_path)
    loaded = load_runtime(Bundle(own.path, own.manifest), "aotinductor", device="cpu")
    after = first_token(loaded)
    assert (after - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor[:-1].contiguous(), "is float32 [79, 48], not float32 [80, 48]; put the model's own"),
        (lambda tensor: tensor.half(), "is float16 [80, 48], not float32 [80, 48]; put the model's own"),
        (None, "no tensor model.layers.1.channel_mixer.l1.weight; put the model's own"),
    ],
)
def test_weights_that_the_code_was_not_compiled_for_are_named(own, change, words):
    weights = load_file(own.weights_path)
    name = "model.layers.1.channel_mixer.l1.weight"
    tensor = weights.pop(name)
    save_file(weights | ({name: change(tensor)} if change else {}), own.weights_path)
    with pytest.raises(EngineMismatchError) as caught:
        load_runtime(Bundle(own.path, own.manifest), "aotinductor", device="cpu")
    assert f"{own.weights_path}: " in one_line(caught)
    assert words in one_line(caught)


def test_memory_is_given_back_although_references_are_left():
    weights = [torch.zeros(4, 5), torch.zeros(3)]
    left = [weight.T for weight in weights[:1]]
    free_memory(weights)
    assert [tensor.untyped_storage().nbytes() for tensor in (*weights, *left)] == [0, 0, 0]


@pytest.mark.gpu
def test_a_runtime_that_is_let_go_leaves_no_weights_on_the_gpu(packaged):
    load_runtime(packaged("cuda"), "aotinductor", device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    runtime = load_runtime(packaged("cuda"), "aotinductor", device="cuda")
    assert torch.cuda.memory_allocated() > before
    del runtime
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_both_programs_read_one_copy_of_the_weights(packaged):
    runtime = load_runtime(packaged("cpu"), "aotinductor", device="cpu")
    prefill, decode = runtime._prefill._constants, runtime._decode._constants
    assert set(prefill) == set(decode)
    assert {name: tensor.data_ptr() for name, tensor in prefill.items()} == {
        name: tensor.data_ptr() for name, tensor in decode.items()
    }


def test_packages_are_compiled_again_only_when_something_changed(own, monkeypatch):
    def compiled(*_):
        raise EngineBuildError("compiled")

    monkeypatch.setattr(ProgramTracer, "prefill", compiled)
    assert build_engines(own, "aotinductor", CPU).cached
    with pytest.raises(EngineBuildError, match="compiled"):
        build_engines(own, "aotinductor", CPU, rebuild=True)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(EngineBuildError, match="compiled"):
        build_engines(own, "aotinductor", CPU)
    monkeypatch.undo()
    monkeypatch.setattr(ProgramTracer, "prefill", compiled)
    (packages_of(own).path / "decode.pt2").write_bytes(b"broken")
    with pytest.raises(EngineBuildError, match="compiled"):
        build_engines(own, "aotinductor", CPU)
    # Nothing that a failed build has begun is left, and what was there still is.
    assert [path.name for path in (own.path / "engines" / "aotinductor").iterdir()] == [packages_of(own).spec.key]


def test_a_bundle_without_packages_names_the_command_that_builds_them(bundle):
    with pytest.raises(EngineMissingError) as caught:
        load_runtime(bundle, "aotinductor", device="cpu")
    command = f"build some with `tnllm build {bundle.path} --target aotinductor --device cpu`"
    assert f"no aotinductor packages for cpu; {command}" in one_line(caught)


def test_a_corrupt_package_is_named(own):
    path = packages_of(own).path / "prefill.pt2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineMismatchError) as caught:
        load_runtime(own, "aotinductor", device="cpu")
    assert f"{path}: missing or not as it was built; build again" in one_line(caught)


def test_a_package_that_would_crash_the_process_is_refused_before_it_is_loaded(own, tmp_path):
    (tmp_path / "code.cpp").write_text("#include <string>\nvoid f(std::string& text) { text += text; }\n")
    command = ["g++", "-shared", "-fPIC", "-static-libstdc++", "code.cpp", "-o", "code.so"]
    subprocess.run(command, check=True, cwd=tmp_path)
    packages = packages_of(own)
    with zipfile.ZipFile(packages.path / "decode.pt2", "w") as archive:
        archive.write(tmp_path / "code.so", "data/aotinductor/model/code.so")
    with pytest.raises(EngineMismatchError) as caught:
        Package(packages, "decode", {}, torch.device("cpu"))
    assert "decode.pt2: its code has a C++ standard library of its own, linked statically" in one_line(caught)
    assert "build again with `tnllm build --target aotinductor --device cpu`" in one_line(caught)


@pytest.mark.parametrize(
    ("changes", "version", "device", "words"),
    [
        ({}, "2.13.0", "cpu (AVX2)", None),
        ({}, "2.14.0", "cpu (AVX2)", "built with torch 2.13.0; 2.14.0 is installed: build again with"),
        ({}, "2.13.0", "cpu (AVX512)", "built for cpu (AVX2); this is cpu (AVX512): build again with"),
        ({"device": "NVIDIA H200 (9.0)"}, "2.13.0", "NVIDIA H100 80GB HBM3 (9.0)", None),
        ({"device": "NVIDIA H200 (9.0)"}, "2.13.0", "NVIDIA A100 (8.0)", "for NVIDIA H200 (9.0); this is NVIDIA A100"),
    ],
)  # fmt: skip
def test_another_version_or_device_is_named_beside_what_was_built_for(packaged, changes, version, device, words):
    spec = packages_of(packaged("cpu")).spec.model_copy(update={"version": "2.13.0", "device": "cpu (AVX2)"} | changes)
    packages = EngineSet(Path("packages"), EngineRecord(spec=spec, files={}, seconds=0.0))
    if words is None:
        check_fits(packages, version, device)
        return
    with pytest.raises(EngineMismatchError) as caught:
        check_fits(packages, version, device)
    assert words in one_line(caught)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so(packaged):
    with pytest.raises(UnsupportedTargetError, match="PyTorch finds no CUDA device"):
        load_runtime(packaged("cpu"), "aotinductor", device="cuda")
    with pytest.raises(EngineBuildError) as caught:
        build_engines(packaged("cpu"), "aotinductor", EngineOptions(device="cuda"))
    assert "PyTorch finds no CUDA device to compile for" in one_line(caught)


def test_a_build_without_a_compiler_or_for_an_unknown_device_says_so(bundle, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineBuildError) as caught:
        build_engines(bundle, "aotinductor", CPU)
    assert "found no C++ compiler 'no-such-compiler'" in one_line(caught)
    with pytest.raises(EngineBuildError, match="device is 'tpu'; aotinductor builds for cpu or cuda"):
        build_engines(bundle, "aotinductor", EngineOptions(device="tpu"))
    with pytest.raises(EngineBuildError, match="tensorrt-rtx builds for no device by name"):
        build_engines(bundle, "tensorrt-rtx", CPU)


def test_a_decode_that_fails_leaves_the_state_usable(packaged, monkeypatch):
    runtime = load_runtime(packaged("cpu"), "aotinductor", device="cpu")
    token, positions = torch.tensor([[4]]), torch.tensor([0])
    expected, _ = runtime.decode(token, positions, runtime.initial_state(1))
    state = runtime.initial_state(1)

    class Failing:
        def run(self, inputs):
            raise RuntimeError("run_func_(...) API call failed\nframe #0")

    with monkeypatch.context() as patch:
        patch.setattr(runtime._decode, "_loader", Failing())
        with pytest.raises(RuntimeTargetError) as caught:
            runtime.decode(token, positions, state)
    assert "decode.pt2: failed: run_func_(...) API call failed" in one_line(caught)
    logits, _ = runtime.decode(token, positions, state)
    assert torch.equal(logits, expected)
    with pytest.raises(StateError, match="consumed"):
        runtime.decode(token, positions, state)


def test_memory_that_did_not_suffice_inside_a_package_is_told_from_other_failures(packaged, monkeypatch):
    runtime = load_runtime(packaged("cpu"), "aotinductor", device="cpu")
    refused = [0]

    class Failing:
        def run(self, inputs):
            refused[0] += 1
            raise RuntimeError("run_func_(...) API call failed\nframe #0")

    monkeypatch.setattr(runtime._prefill, "_loader", Failing())
    monkeypatch.setattr(aotinductor, "_refused_allocations", lambda device: refused[0])
    monkeypatch.setattr(device_memory, "_free", lambda device: "1.00 GiB of 2.00 GiB")
    with pytest.raises(DeviceMemoryError) as caught:
        first_token(runtime)
    assert one_line(caught) == (
        "prefill of 1 x 3 tokens: the GPU's memory does not suffice: more memory asked for, 1.00 GiB of 2.00 GiB free; "
        "feed the prompt in smaller pieces (--prefill-chunk)"
    )


@pytest.mark.gpu
def test_a_prefill_that_does_not_fit_into_the_gpu_says_so_and_leaves_the_state_usable(packaged):
    runtime = load_runtime(packaged("cuda"), "aotinductor", device="cuda")
    state = runtime.initial_state(1)
    lengths, positions = torch.tensor([3], dtype=torch.int32), torch.tensor([0])
    expected, _ = runtime.prefill(torch.tensor([[5, 6, 7]]), lengths, positions, state)
    held = torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(held + 0.001)
    try:
        with pytest.raises(DeviceMemoryError) as caught:
            runtime.prefill(
                torch.zeros(1, 2**20, dtype=torch.int64), torch.tensor([2**20], dtype=torch.int32), positions, state
            )
        assert "prefill of 1 x 1048576 tokens: the GPU's memory does not suffice" in one_line(caught)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    again, _ = runtime.prefill(torch.tensor([[5, 6, 7]]), lengths, positions, state)
    assert torch.equal(again, expected)


@pytest.mark.gpu
def test_a_step_captured_for_one_sequence_copies_no_unaligned_input(packaged, capfd):
    runtime = load_runtime(packaged("cuda"), "aotinductor", device="cuda")
    runtime.decode(torch.tensor([[4]]), torch.tensor([0]), runtime.initial_state(1))
    assert "aligned" not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "float32"), pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu)]
)
def test_the_demo_checkpoint_passes_verification(tmp_path, device, dtype):
    bundle = export_bundle(checkpoint_folder(), tmp_path / "demo", dtype=dtype)
    # Choosing vectors for its symbolic shapes takes minutes; the small model is compiled with them.
    with inductor_config.patch({"cpp.simdlen": 1}):
        build_engines(bundle, "aotinductor", EngineOptions(device=device))
    verify_bundle(bundle, "aotinductor", device=device, seed=0).require_pass()
