"""What the TensorRT runtime refuses before a GPU has anything to do, and how it says so.

Engines are run by tests marked `tensorrt`, for who has a GPU that they run on.
"""

import json
import os
import shutil
import sys
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.bundle.engines import (
    EngineRecord,
    EngineSet,
    EngineSpec,
    PluginRecord,
    ProfileRecord,
    writing_engines,
)
from tnllm_export.errors import (
    EngineMismatchError,
    EngineMissingError,
    ProfileError,
    RuntimeMissingError,
    RuntimeTargetError,
    UnsupportedTargetError,
)
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.runtime import RuntimeInfo, load_runtime, tensorrt
from tnllm_export.runtime.engines import Gpu, check_fits, choose_engines, deserialize
from tnllm_export.runtime.tensorrt import TensorrtRuntime, check_profile
from tnllm_export.runtime.tensorrt_program import Context, Program
from tnllm_export.tensorrt import engine_target, import_tensorrt

ADA = Gpu("NVIDIA GeForce RTX 4090", "8.9")
HOPPER = Gpu("NVIDIA H200", "9.0")
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", "12.0")
VERSION = "1.7.1.116"


def spec_of(bundle: Bundle, **changes) -> EngineSpec:
    manifest = bundle.manifest
    spec = EngineSpec(
        recipe=1,
        target="tensorrt-rtx",
        version=VERSION,
        device="",
        compute_capabilities=(),
        graphs={name: manifest.files[f"{name}.onnx"].sha256 for name in ("prefill", "decode")},
        weights_sha256=manifest.files[manifest.weights].sha256,
        dtype=manifest.dtype,
        lowering=manifest.lowering,
        weights="embedded",
        profile=ProfileRecord(max_batch=4, opt_batch=1, max_prompt=64, opt_prompt=64),
        tf32=False,
        plugin=None,
    )
    return spec.model_copy(update=changes)


def put(bundle: Bundle, spec: EngineSpec) -> EngineSet:
    """Put engines of no content into a bundle."""
    with writing_engines(bundle.path, spec) as writer:
        for program in ("prefill", "decode"):
            writer.write(program, lambda write: write(b"no engine"))
        return writer.commit(1.0)


@pytest.fixture
def own(bundle: Bundle, tmp_path) -> Bundle:
    return open_bundle(shutil.copytree(bundle.path, tmp_path / "own"))


def one_line(error) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


def test_a_bundle_without_engines_names_the_command_that_builds_them(own):
    with pytest.raises(EngineMissingError) as error:
        choose_engines(own, "tensorrt-rtx")
    assert "no tensorrt-rtx engines; build some with `tnllm build" in one_line(error)
    put(own, spec_of(own, target="tensorrt"))
    with pytest.raises(EngineMissingError):
        choose_engines(own, "tensorrt-rtx")


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_without_tensorrt_one_line_names_the_extra(own, monkeypatch, name):
    put(own, spec_of(own, target=name))
    monkeypatch.setitem(sys.modules, engine_target(name).module, None)
    with pytest.raises(RuntimeMissingError) as error:
        load_runtime(own, name)
    assert f"pip install 'tnllm-export[{name}]'" in one_line(error)


def test_engines_of_other_weights_or_graphs_are_not_taken(own):
    other = "0" * 64
    put(own, spec_of(own, weights_sha256=other))
    put(own, spec_of(own, graphs={"prefill": other, "decode": other}))
    with pytest.raises(EngineMissingError) as error:
        choose_engines(own, "tensorrt-rtx")
    assert "built from other graphs or weights than it has now" in one_line(error)
    light = put(own, spec_of(own, weights="external", weights_sha256=""))
    assert choose_engines(own, "tensorrt-rtx") == light


def test_the_engines_that_were_built_last_are_taken_unless_a_key_is_named(own):
    first = put(own, spec_of(own))
    second = put(own, spec_of(own, profile=ProfileRecord(max_batch=8, opt_batch=1, max_prompt=64, opt_prompt=64)))
    os.utime(first.path, ns=(1, 1))
    assert choose_engines(own, "tensorrt-rtx") == second
    assert choose_engines(own, "tensorrt-rtx", first.spec.key) == first
    with pytest.raises(EngineMissingError, match="no tensorrt-rtx engines 0123"):
        choose_engines(own, "tensorrt-rtx", "0123")


@pytest.mark.parametrize(
    ("changes", "gpu", "words"),
    [
        ({}, ADA, None),
        ({}, BLACKWELL, None),
        ({}, HOPPER, "8.0, 8.6, 8.9, 12.0 and later; this GPU, NVIDIA H200, has 9.0: build and run with"),
        ({"compute_capabilities": ("8.6",)}, ADA, "capability 8.6; this GPU, NVIDIA GeForce RTX 4090, has 8.9"),
        ({"compute_capabilities": ("8.6",)}, ADA, "build again with --sm 8.9"),
        ({"compute_capabilities": ("8.6", "8.9")}, ADA, None),
        ({"version": "1.6.1.120"}, ADA, "built with tensorrt_rtx 1.6.1.120; 1.7.1.116 is installed: build again"),
        ({"target": "tensorrt", "device": "NVIDIA H200 (9.0)"}, HOPPER, None),
        ({"target": "tensorrt", "device": "NVIDIA A100 (8.0)"}, HOPPER, "has 9.0: build again on this GPU"),
    ],
)  # fmt: skip
def test_a_gpu_or_version_that_does_not_fit_is_named_beside_what_does(bundle, tmp_path, changes, gpu, words):
    spec = spec_of(bundle, **changes)
    engines = EngineSet(tmp_path, EngineRecord(spec=spec, files={}, seconds=0.0))
    if words is None:
        check_fits(engines, engine_target(spec.target), VERSION, gpu)
        return
    with pytest.raises(EngineMismatchError) as error:
        check_fits(engines, engine_target(spec.target), VERSION, gpu)
    assert words in one_line(error)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform")
@pytest.mark.parametrize("content", [b"no engine", bytes(4096), b"vtrt" + bytes(4096)])
def test_a_corrupt_engine_is_named_with_what_tensorrt_says(own, content):
    trt = import_tensorrt(engine_target("tensorrt-rtx"))
    with writing_engines(own.path, spec_of(own)) as writer:
        writer.write("prefill", lambda write: write(content))
        engines = writer.commit(0.0)
    with pytest.raises(EngineMismatchError) as error:
        deserialize(trt, engines, "prefill", own.prefill_path)
    assert f"prefill.engine: tensorrt_rtx {trt.__version__} refuses it (" in one_line(error)
    assert "no reason given" not in str(error.value)
    assert "build again with `tnllm build`" in str(error.value)


def tensorrt_that_refits(reads: bool, refits: bool, seen: list[str]) -> ModuleType:
    """TensorRT as far as loading a stripped engine goes."""
    trt = ModuleType("tensorrt_rtx")
    trt.__version__ = VERSION
    trt.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)})
    trt.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda content: content[:])
    trt.Refitter = lambda engine, log: SimpleNamespace(engine=engine, refit_cuda_engine=lambda: refits)

    def read(refitter, log):
        assert refitter.engine == b"no engine"
        return SimpleNamespace(refit_from_file=lambda path: seen.append(path) or reads)

    trt.OnnxParserRefitter = read
    return trt


@pytest.mark.parametrize(("reads", "refits"), [(True, True), (True, False), (False, True)])
def test_a_stripped_engine_takes_the_weights_beside_the_graph_or_names_the_way_out(own, monkeypatch, reads, refits):
    engines = put(own, spec_of(own, weights="stripped", weights_sha256=""))
    monkeypatch.chdir(own.path.parent)
    graph, seen = Path(own.path.name, "decode.onnx"), []
    trt = tensorrt_that_refits(reads, refits, seen)
    if reads and refits:
        assert deserialize(trt, engines, "decode", graph) == b"no engine"
    else:
        with pytest.raises(EngineMismatchError) as error:
            deserialize(trt, engines, "decode", graph)
        assert "decode.engine: its weights can't be put back (" in one_line(error)
        assert "build again with --weights external" in str(error.value)
    # Weights are looked for beside the path: it has to be absolute.
    assert seen == [str(own.prefill_path.resolve().with_name("decode.onnx"))]
    embedded = put(own, spec_of(own))
    deserialize(trt, embedded, "decode", graph)
    assert len(seen) == 1


def test_a_request_beyond_the_profile_says_what_fits_and_how_to_get_more():
    profile = ProfileRecord(max_batch=4, opt_batch=1, max_prompt=64, opt_prompt=64)
    check_profile(profile, 4, 64)
    with pytest.raises(ProfileError) as error:
        check_profile(profile, 5, 1)
    assert "batch is 5; the engines take at most 4: build again with --max-batch 5" in one_line(error)
    with pytest.raises(ProfileError) as error:
        check_profile(profile, 1, 65)
    assert "65 tokens; the engines take at most 64 at once: feed it in pieces (--prefill-chunk 64)" in one_line(error)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so_and_what_runs_instead(own):
    put(own, spec_of(own))
    with pytest.raises(UnsupportedTargetError) as error:
        load_runtime(own, "tensorrt-rtx")
    assert "PyTorch finds no CUDA device" in one_line(error)
    assert "runtime onnxruntime or torch" in str(error.value)
    with pytest.raises(UnsupportedTargetError, match="does not run on device 'cpu'; expected one of: cuda"):
        load_runtime(own, "tensorrt-rtx", device="cpu")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform")
@pytest.mark.parametrize("captured", [False, True])
def test_kernels_of_what_is_captured_are_not_exchanged_while_it_runs(tmp_path, captured):
    trt = import_tensorrt(engine_target("tensorrt-rtx"))
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    assert hasattr(trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    (tmp_path / "kernels").write_bytes(b"compiled before")
    seen = []
    config = SimpleNamespace(
        dynamic_shapes_kernel_specialization_strategy=strategies.LAZY,
        create_runtime_cache=lambda: SimpleNamespace(deserialize=seen.append),
        set_runtime_cache=seen.append,
    )
    engine = SimpleNamespace(num_io_tensors=0, create_runtime_config=lambda: config)
    Program(trt, engine, {}, None, tmp_path / "kernels", captured=captured)
    assert seen[0] == b"compiled before"
    assert len(seen) == 2
    expected = strategies.EAGER if captured else strategies.LAZY
    assert config.dynamic_shapes_kernel_specialization_strategy == expected


def test_only_what_tensorrt_can_run_in_a_capture_is_captured():
    program = SimpleNamespace(stream=SimpleNamespace(cuda_stream=7))
    for answer in (False, True):
        context = SimpleNamespace(is_stream_capturable={7: answer}.__getitem__)
        assert Context(program, context).capturable == answer
    # TensorRT has no such question: it always can.
    assert Context(program, SimpleNamespace()).capturable


def test_a_library_that_is_not_embedded_lies_beside_the_engines(own):
    beside = spec_of(own, plugin=PluginRecord(sha256="0" * 64, embedded=False))
    embedded = spec_of(own, plugin=PluginRecord(sha256="0" * 64, embedded=True))
    with writing_engines(own.path, beside) as writer:
        source = own.path / "manifest.json"
        writer.copy_plugin_library(source)
        engines = writer.commit(0.0)
    assert engines.plugin_library is not None
    assert engines.plugin_library.read_bytes() == source.read_bytes()
    engines.check()
    assert put(own, embedded).plugin_library is None
    assert put(own, spec_of(own)).plugin_library is None


def test_a_record_that_a_newer_version_wrote_is_not_taken_for_ours(own):
    engines = put(own, spec_of(own))
    path = engines.path / "engines.json"
    fields = json.loads(path.read_text())
    assert fields["schema_version"] == 1
    path.write_text(json.dumps(fields | {"schema_version": 2}))
    with pytest.raises(EngineMissingError):
        choose_engines(own, "tensorrt-rtx")


CONFIG = TransnormerConfig(vocab_size=97, decoder_embed_dim=32, decoder_attention_heads=2, decoder_layers=2, glu_dim=32)
TOKEN = torch.ones(1, 1, dtype=torch.int64)


class FakeStream:
    """Says what it waits for."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.cuda_stream = name, said, 7

    def wait_stream(self, other: "FakeStream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.said.append(f"host waits for {self.name}")


class FakeContext:
    """Runs a program, or fails at its "enqueue" or in a "capture"."""

    capturable = True

    def __init__(self, said: list[str], failing: str) -> None:
        self.said, self.failing = said, failing

    def bind(self, inputs, outputs):
        self.said.append("bind")

    def enqueue(self):
        self.said.append("enqueue")
        if self.failing == "enqueue":
            raise RuntimeTargetError("tnllm::LightningAttention: failed")


@pytest.fixture
def fake_runtime(monkeypatch):
    """A runtime on the CPU, and what its streams and contexts say."""

    def make(failing: str) -> tuple[TensorrtRuntime, list[str]]:
        said: list[str] = []
        side, current = FakeStream("side", said), FakeStream("current", said)
        program = SimpleNamespace(
            stream=side, context=lambda: FakeContext(said, failing), save_cache=lambda: said.append("save")
        )
        real = torch.empty

        def empty(*sizes, pin_memory=False, **options):
            return real(*sizes, **options)

        def capture(*args, **options):
            assert options["capture_error_mode"] == "thread_local"
            if failing == "capture":
                raise RuntimeError("operation not permitted when stream is capturing")
            return nullcontext()

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: said.append("replay")))
        monkeypatch.setattr(tensorrt, "_pinned", lambda tensor: tensor)
        monkeypatch.setattr(tensorrt, "recover", lambda *_: said.append("recover"))
        info = RuntimeInfo(name="tensorrt", device="cuda", dtype="float32", config=CONFIG, logits="last")
        profile = SimpleNamespace(max_batch=4, max_prompt=64)
        return TensorrtRuntime(info, program, program, profile, torch.device("cpu")), said

    return make


def test_what_a_failed_request_has_started_is_waited_for_before_its_buffers_go(fake_runtime):
    runtime, said = fake_runtime("enqueue")
    state = runtime.initial_state(1)
    with pytest.raises(RuntimeTargetError):
        runtime.prefill(TOKEN, torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), state)
    assert said[-2:] == ["enqueue", "current waits for side"]
    with pytest.raises(RuntimeTargetError):
        runtime.decode(TOKEN, torch.zeros(1, dtype=torch.int64), state)
    assert said[-2:] == ["enqueue", "host waits for side"]


@pytest.mark.parametrize("failing", ["", "capture"])
def test_a_step_that_can_not_be_captured_is_launched_instead_with_one_warning(fake_runtime, failing):
    runtime, said = fake_runtime(failing)
    state = runtime.initial_state(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for position in range(6):
            _, state = runtime.decode(TOKEN, torch.full((1,), position), state)
    assert said.count("recover") == len(seen) == (1 if failing else 0)
    assert said.count("replay") == (0 if failing else 4)
    assert said.count("enqueue") == (6 if failing else 4)  # without a failure: two runs and two captures
