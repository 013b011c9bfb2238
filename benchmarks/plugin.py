"""The TensorRT plugins beside the same kernels launched by Triton, in CUDA graphs, on the same tensors."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.attention_cases import ERROR_LIMITS, LAYERS, MIDDLE_LAYER, Shape, make_inputs, relative_error
from benchmarks.decode import step_bytes
from benchmarks.gpu_timing import Call, alternating_milliseconds, ceilings, set_count
from benchmarks.names import PLUGIN, PLUGIN_PARITY, TRITON
from benchmarks.plugin_driver import PluginLibrary, compile_driver
from benchmarks.records import Record, gpu_versions
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm_export.kernels.lightning_attention.chunk import sweep
from tnllm_export.kernels.lightning_attention.step_kernel import step
from tnllm_export.models.decay import slope_rates
from tnllm_export.plugins.build import DTYPES, PluginOptions, build_plugin
from tnllm_export.progress import Progress, silent

NAME = "plugin"
DEVICE = "cuda"

STATE_ERROR_LIMIT = 3e-5
TURNS = 60
GRAPH_CALLS = 24
SHORT_MS = 0.3


@dataclass(frozen=True)
class Case:
    """One token is the decode step, more are the chunk op."""

    shape: Shape
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.shape} | {str(self.dtype).removeprefix('torch.')}"

    @property
    def is_step(self) -> bool:
        """Whether it is the decode step."""
        return self.shape.tokens == 1

    @property
    def bytes(self) -> int:
        """Read and written once: activations, and the state of a step."""
        size = self.dtype.itemsize
        return step_bytes(self.shape, size) if self.is_step else self.shape.forward_bytes(size)


CASES = (
    *(Case(Shape(1, 32, tokens)) for tokens in (1024, 4096, 16384)),
    *(Case(Shape(*sizes)) for sizes in ((4, 32, 8192), (8, 16, 4096))),
    Case(Shape(1, 32, 16384, key_dim=256)),
    Case(Shape(1, 32, 4096), torch.float16),
    Case(Shape(1, 32, 4096), torch.float32),
    *(Case(Shape(batch, 32, 1)) for batch in (1, 8, 64, 256)),
    Case(Shape(64, 32, 1, key_dim=256)),
)

Form = Callable[[Sequence[Tensor], Tensor, Tensor], Call]
"""From inputs, output and present state to a call that computes them on the current stream."""


def run(progress: Progress = silent) -> Iterator[Record]:
    """Measure every case on the GPU."""
    major, minor = torch.cuda.get_device_capability()
    library = build_plugin(PluginOptions(capabilities=(10 * major + minor,), dtypes=DTYPES), progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        plugin = plugin_form(PluginLibrary(compile_driver(Path(folder)), library))
        for done, case in enumerate(CASES):
            progress(f"plugin, {case}", done, len(CASES), "cases")
            yield from measure(case, plugin)
            torch.cuda.empty_cache()
    progress("plugin", len(CASES), len(CASES), "cases")


def plugin_form(plugins: PluginLibrary) -> Form:
    """Return calls through TensorRT's interface: the plugin of an execution context, with a workspace of its own."""

    def bind(inputs: Sequence[Tensor], output: Tensor, state: Tensor) -> Call:
        tensors = [*inputs, output, state]
        op = LIGHTNING_ATTENTION_STEP if len(inputs) == 5 else LIGHTNING_ATTENTION
        plugin = plugins.create(op.onnx_name)
        size = plugin.configure(tensors)
        workspace = torch.empty(size, dtype=torch.uint8, device=output.device) if size else None
        context = plugin.recreate().attach()
        context.change_shapes(tensors)
        call = context.call(tensors, workspace)
        return lambda: call(torch.cuda.current_stream().cuda_stream)

    return bind


def triton_form(inputs: Sequence[Tensor], output: Tensor, state: Tensor) -> Call:
    """Return calls of the same kernels as Triton launches them."""
    kernel: Callable[..., None] = step if len(inputs) == 5 else sweep
    return lambda: kernel(*inputs, output, state)


def measure(case: Case, plugin: Form, device: str = DEVICE) -> Iterator[Record]:
    """Check both against float64, then time them in turns.

    Raises:
        RuntimeError: The plugin's result is wrong.
    """
    versions = gpu_versions()
    count = set_count(case.bytes) if device == "cuda" else 1
    sets = [draw(case, device, seed) for seed in range(count)]
    results = [[torch.empty_like(inputs[2]), torch.empty_like(inputs[4])] for inputs in sets]
    calls = [[form(x, *result) for x, result in zip(sets, results, strict=True)] for form in (plugin, triton_form)]
    errors = [errors_of(case, sets[0], results[0], called[0]) for called in calls]
    limits = {"output": ERROR_LIMITS[case.dtype], "state": STATE_ERROR_LIMIT}
    for quantity, limit in limits.items():
        ours, peer = (error[quantity] for error in errors)
        yield Record(PLUGIN_PARITY, f"{case} | {quantity}", "relative error", "1", ours, limit, TRITON, peer, versions)
        if not ours <= limit:
            raise RuntimeError(f"{case}: relative error of {quantity} is {ours:.1e}; expected at most {limit:.0e}")
    rounds, turns = (_rounds(calls[0]), TURNS) if device == "cuda" else (1, 2)
    timed = [capture(called, rounds) if device == "cuda" else called[0] for called in calls]
    ours, peer = (1e3 * time / (rounds * count) for time in alternating_milliseconds(timed, device, turns))
    floor = 1e6 * case.bytes / ceilings(device).bandwidth
    yield Record(PLUGIN, str(case), "time", "µs", ours, floor, TRITON, peer, versions)


def draw(case: Case, device: str, seed: int) -> list[Tensor]:
    """Return the op's inputs, with a past state."""
    inputs = make_inputs(case.shape, case.dtype, device, continued=True, seed=seed)
    rows = [inputs.query, inputs.key, inputs.value]
    slope_rate = slope_rates("release", MIDDLE_LAYER, LAYERS, case.shape.heads).to(device)
    if case.is_step:
        return [*(x[:, 0] for x in rows), slope_rate, inputs.past_state]
    return [*rows, slope_rate, inputs.past_state, inputs.lengths]


def errors_of(case: Case, inputs: Sequence[Tensor], results: Sequence[Tensor], call: Call) -> dict[str, float]:
    """Relative errors of output and state after one call."""
    for result in results:
        result.fill_(torch.nan)
    call()
    with use_kernels("pytorch"):
        function = lightning_attention_step if case.is_step else lightning_attention
        wide = function(*(x.double() if x.is_floating_point() else x for x in inputs))
    return {
        name: relative_error(found, expected)
        for name, found, expected in zip(("output", "state"), results, wide, strict=True)
    }


def capture(calls: Sequence[Call], rounds: int) -> Call:
    """Return the replay of a CUDA graph that makes all calls, `rounds` times."""
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    return graph.replay


def _rounds(calls: Sequence[Call]) -> int:
    """How often to repeat the calls in a graph: short ones often, for launching a graph takes time, too."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls[0]()
    start.record()
    calls[0]()
    end.record()
    torch.cuda.synchronize()
    return -(-GRAPH_CALLS // len(calls)) if start.elapsed_time(end) < SHORT_MS else 1
