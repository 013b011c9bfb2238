"""ONNX Runtime on CUDA: its buffers and numbers of graphs, tried over sessions on the CPU; its errors; and on a GPU."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import tnllm_export.demo
from tnllm_export.bundle import Bundle
from tnllm_export.errors import DeviceMemoryError, RuntimeMissingError, RuntimeTargetError, UnsupportedTargetError
from tnllm_export.export import export_bundle
from tnllm_export.runtime import Runtime, TorchRuntime, load_runtime
from tnllm_export.runtime.onnxruntime_cuda import OnnxRuntimeCuda, import_onnxruntime_gpu
from tnllm_export.runtime.onnxruntime_graphs import PROVIDER, Program

CPU = torch.device("cpu")
SHIPPED = Path(tnllm_export.demo.__file__).parent / "checkpoint"


class Recorder:
    """A session on the CPU that notes the graph number of each run, and fails when it is told to."""

    def __init__(self, path: Any) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.runs: list[str | None] = []
        self.released: list[int] = []
        self.failure: Exception | None = None

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.runs.append(None if options is None else options.get_run_config_entry("gpu_graph_id"))
        self.session.run_with_iobinding(binding, options)

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)


@pytest.fixture
def sessions(bundle: Bundle) -> dict[str, Recorder]:
    return {"prefill": Recorder(bundle.prefill_path), "decode": Recorder(bundle.decode_path)}


@pytest.fixture
def on_cpu(bundle: Bundle, sessions: dict[str, Recorder]) -> OnnxRuntimeCuda:
    """The class as it is, with sessions on the CPU in the place of those on a GPU."""
    info = load_runtime(bundle, "onnxruntime").info
    decode = Program(sessions["decode"], CPU, run_options=onnxruntime.RunOptions)
    return OnnxRuntimeCuda(info, Program(sessions["prefill"], CPU), decode)


def steps(runtime: Runtime, state: object, tokens: list[int], batch: int = 1) -> tuple[torch.Tensor, object]:
    logits = torch.empty(0)
    for position, token in enumerate(tokens):
        ids = torch.full((batch, 1), token)
        logits, state = runtime.decode(ids, torch.full((batch,), position), state)
    return logits, state


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_answers_as_the_runtime_on_the_cpu(on_cpu: OnnxRuntimeCuda, bundle: Bundle) -> None:
    expected = load_runtime(bundle, "onnxruntime")
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([70, 5], dtype=torch.int32)
    answers = []
    for runtime in (on_cpu, expected):
        logits, state = runtime.prefill(ids, lengths, torch.zeros(2, dtype=torch.int64), runtime.initial_state(2))
        step, state = steps(runtime, state, [5, 6, 7], batch=2)
        moved = runtime.device_state(runtime.host_state(state))
        answers.append([logits, step, steps(runtime, moved, [9], batch=2)[0], *runtime.host_state(state)])
    for found, wanted in zip(*answers, strict=True):
        assert wanted.norm() > 0
        assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_steps_go_to_and_fro_between_two_graphs(on_cpu: OnnxRuntimeCuda, sessions: dict[str, Recorder]) -> None:
    steps(on_cpu, on_cpu.initial_state(1), [1, 2, 3, 4, 5])
    assert sessions["decode"].runs == ["1", "2", "1", "2", "1"]
    ids, lengths, none = torch.tensor([[4]]), torch.ones(1, dtype=torch.int32), torch.tensor([0])
    on_cpu.prefill(ids, lengths, none, on_cpu.initial_state(1))
    assert sessions["prefill"].runs == [None]


def test_the_next_text_takes_the_slot_of_one_that_has_ended(
    on_cpu: OnnxRuntimeCuda, sessions: dict[str, Recorder]
) -> None:
    first = steps(on_cpu, on_cpu.initial_state(1), [1, 2])[0]
    again = steps(on_cpu, on_cpu.initial_state(1), [1, 2])[0]
    assert torch.equal(first, again)
    assert sessions["decode"].runs == ["1", "2", "1", "2"]


def test_states_that_are_alive_together_have_graphs_of_their_own(
    on_cpu: OnnxRuntimeCuda, sessions: dict[str, Recorder]
) -> None:
    _, one = steps(on_cpu, on_cpu.initial_state(1), [1])
    before = on_cpu.host_state(one)
    _, other = steps(on_cpu, on_cpu.initial_state(1), [2, 3])
    assert sessions["decode"].runs == ["1", "3", "4"]
    assert all(torch.equal(a, b) for a, b in zip(before, on_cpu.host_state(one), strict=True))
    del one, other
    steps(on_cpu, on_cpu.initial_state(1), [1])
    # One slot waits for the next text; the graphs of the other are gone.
    assert sessions["decode"].released == [1, 2]
    assert sessions["decode"].runs[-1] == "3"


def test_a_batch_of_another_size_lets_go_of_the_slot_that_waits(
    on_cpu: OnnxRuntimeCuda, sessions: dict[str, Recorder]
) -> None:
    steps(on_cpu, on_cpu.initial_state(1), [1])
    steps(on_cpu, on_cpu.initial_state(3), [1], batch=3)
    assert sessions["decode"].runs == ["1", "3"]
    assert sessions["decode"].released == [1, 2]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("bad things\nat some line", RuntimeTargetError),
        ("Failed to allocate memory for requested buffer of size 1024", DeviceMemoryError),
        ("CUDA failure 2: out of memory ; GPU=0", DeviceMemoryError),
    ],
)
def test_a_failed_step_is_one_line_and_leaves_the_state_as_it_was(
    on_cpu: OnnxRuntimeCuda, sessions: dict[str, Recorder], message: str, kind: type[Exception]
) -> None:
    _, state = steps(on_cpu, on_cpu.initial_state(1), [1, 2])
    before = on_cpu.host_state(state)
    sessions["decode"].failure = RuntimeError(message)
    with pytest.raises(kind) as caught:
        on_cpu.decode(torch.tensor([[3]]), torch.tensor([2]), state)
    assert type(caught.value) is kind
    assert one_line(caught).startswith("decode: onnxruntime failed (")
    sessions["decode"].failure = None
    assert all(torch.equal(a, b) for a, b in zip(before, on_cpu.host_state(state), strict=True))
    expected, _ = steps(on_cpu, on_cpu.initial_state(1), [1, 2, 3])
    found, _ = on_cpu.decode(torch.tensor([[3]]), torch.tensor([2]), state)
    assert torch.equal(found, expected)


def test_the_build_for_cpus_is_told_how_to_get_the_other(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    only_cpu = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", only_cpu)
    with pytest.raises(RuntimeMissingError) as caught:
        load_runtime(bundle, "onnxruntime", device="cuda")
    assert f"onnxruntime 1.31.1 has no {PROVIDER}, only CPUExecutionProvider" in one_line(caught)
    assert "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu" in one_line(caught)


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    with_cuda = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: [PROVIDER])
    monkeypatch.setitem(sys.modules, "onnxruntime", with_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedTargetError) as caught:
        load_runtime(bundle, "onnxruntime", device="cuda")
    assert "onnxruntime on cuda needs an NVIDIA GPU" in one_line(caught)
    assert "--device cpu" in one_line(caught)


class FakeOrt:
    """As much of the package as opening a session takes."""

    __version__ = "1.31.1"
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.providers: list[Any] = []
        self.log_levels: list[int] = []
        self.plans_memory: bool | None = None

    def set_default_logger_severity(self, level: int) -> None:
        self.log_levels.append(level)

    def InferenceSession(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:  # noqa: N802
        assert enable_fallback == 0
        assert self.log_levels, "too late: opening a session warns"
        self.providers = providers
        self.log_levels.append(options.log_severity_level)
        self.plans_memory = options.enable_mem_pattern
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return SimpleNamespace(get_providers=lambda: self.outcome)


def open_with(outcome: Any) -> FakeOrt:
    ort = FakeOrt(outcome)
    stream = SimpleNamespace(cuda_stream=7)
    Program.open(ort, "decode.onnx", {}, torch.device("cuda:0"), stream, capture=True, threads=None)
    return ort


def test_sessions_get_our_stream_full_precision_and_cuda_graphs() -> None:
    [(name, options)] = open_with([PROVIDER]).providers
    assert name == PROVIDER
    assert (options["user_compute_stream"], options["use_tf32"], options["enable_cuda_graph"]) == ("7", "0", "1")


def test_opening_a_session_prints_no_warnings_and_keeps_no_memory_for_the_next_prompt() -> None:
    ort = open_with([PROVIDER])
    assert ort.log_levels == [3, 3]
    assert ort.plans_memory is False


@pytest.mark.parametrize(
    ("outcome", "kind", "words"),
    [
        (["CPUExecutionProvider"], RuntimeMissingError, "can't load its CUDA libraries"),
        (RuntimeError("no kernel for X\nmore"), UnsupportedTargetError, "refuses the graph (no kernel for X)"),
        (RuntimeError("Failed to allocate memory"), DeviceMemoryError, "(Failed to allocate memory)"),
    ],
)
def test_a_session_that_does_not_open_says_why_in_one_line(outcome: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        open_with(outcome)
    assert words in one_line(caught)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def gpu_bundle(request: pytest.FixtureRequest, model: Any, tmp_path: Any) -> Bundle:
    from .conftest import write_checkpoint

    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime has no {PROVIDER}")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(model, checkpoint)
    # Not api.export, which warns that there is no tokenizer: here, a warning is an error.
    return export_bundle(checkpoint, tmp_path / "bundle", dtype=request.param, lowering="hybrid")


@pytest.mark.gpu
def test_on_a_gpu_it_agrees_with_the_eager_model(gpu_bundle: Bundle) -> None:
    from tnllm_export.verify import verify_bundle

    report = verify_bundle(gpu_bundle, "onnxruntime", device="cuda", save=False)
    print([(check.claim, check.measured, check.limit) for check in report.checks])
    report.require_pass()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu_the_demo_model_is_as_near_to_float32_as_the_eager_one(dtype: Any, tmp_path: Any) -> None:
    """Its activations are large, unlike those of random weights: it shows where a kernel rounds on the way."""
    from tnllm_export.verify import verify_bundle

    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime has no {PROVIDER}")
    bundle = export_bundle(SHIPPED, tmp_path / "demo", dtype=dtype, lowering="hybrid")
    report = verify_bundle(bundle, "onnxruntime", device="cuda", seed=7, save=False)
    distances = {stick.quantity: stick.candidate / stick.reference for stick in report.yardsticks}
    print(distances)
    report.require_pass()
    assert distances["logits"] <= 1.2


@pytest.mark.gpu
def test_on_a_gpu_weights_are_there_once(gpu_bundle: Bundle) -> None:
    """Sessions that copied them would not notice that ours have changed."""
    from tnllm_export.runtime import onnxruntime_cuda

    kept: dict[str, torch.Tensor] = {}

    def read(ort: Any, bundle: Bundle, device: torch.device) -> dict[str, Any]:
        kept.update(load_file(bundle.weights_path, device=str(device)))
        return {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in kept.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_cuda, "read_weights", read)
        runtime = load_runtime(gpu_bundle, "onnxruntime", device="cuda")
    logits, _ = steps(runtime, runtime.initial_state(1), [3])
    assert logits.abs().max() > 0
    kept["model.embed_tokens.weight"].zero_()
    torch.cuda.synchronize()
    logits, _ = steps(runtime, runtime.initial_state(1), [3])
    assert logits.abs().max() == 0
    ids, lengths = torch.tensor([[4, 5]]), torch.full((1,), 2, dtype=torch.int32)
    logits, _ = runtime.prefill(ids, lengths, torch.zeros(1, dtype=torch.int64), runtime.initial_state(1))
    assert logits.abs().max() == 0


@pytest.mark.gpu
def test_on_a_gpu_decode_replays_as_it_first_ran(gpu_bundle: Bundle) -> None:
    import_onnxruntime_gpu()
    runtime = load_runtime(gpu_bundle, "onnxruntime", device="cuda")
    eager = TorchRuntime.from_bundle(gpu_bundle)
    tokens = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    first, _ = steps(runtime, runtime.initial_state(2), tokens, batch=2)
    again, _ = steps(runtime, runtime.initial_state(2), tokens, batch=2)
    expected, _ = steps(eager, eager.initial_state(2), tokens, batch=2)
    limit = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1.6e-1}[runtime.info.dtype]
    assert first.is_cuda
    assert torch.equal(first, again)
    assert float((first.cpu() - expected).norm() / expected.norm()) < limit
