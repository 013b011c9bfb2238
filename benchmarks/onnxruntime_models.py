"""ONNX Runtime over a model that is in memory: an export's graphs, and the model's own weights, never on a disk."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference_models import prefill, random_model
from benchmarks.inference_plan import release
from tnllm_export.bundle import WEIGHTS
from tnllm_export.bundle.layout import TensorSpec, plan_weights
from tnllm_export.export.finished import finish_graph
from tnllm_export.export.graphs import GraphBuilder
from tnllm_export.export.template import Template
from tnllm_export.export.tracing import Tracing, trace_programs
from tnllm_export.graphs.traced import TracedProgram
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import silent
from tnllm_export.runtime import Runtime, RuntimeInfo, TorchRuntime
from tnllm_export.runtime.onnxruntime import import_onnxruntime
from tnllm_export.runtime.onnxruntime_cuda import OnnxRuntimeCuda, import_onnxruntime_gpu
from tnllm_export.runtime.onnxruntime_graphs import Program
from tnllm_export.verify.tolerances import tolerance

Traced = Mapping[str, TracedProgram]

_FOLDED_BYTES = 1 << 20
"""Weights up to this size are computed with when a session starts: LRPE's angles."""


def trace(config: TransnormerConfig, dtype: torch.dtype) -> Traced:
    """Trace both programs of a model of this configuration."""
    tracing = Tracing(Template.of(config).config, dtype, "last")
    return dict(trace_programs(lambda: tracing, silent))


@contextmanager
def onnxruntime_over(model: TransnormerForCausalLM, traced: Traced, lowering: str) -> Iterator[OnnxRuntimeCuda]:
    """Open a model's graphs of some lowering on its device: on the CPU, too, by the class for CUDA."""
    with TemporaryDirectory(prefix="tnllm-onnxruntime-") as folder:
        paths = _write_graphs(Path(folder), model, traced, lowering)
        config, device = model.config, model.device
        dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
        info = RuntimeInfo("onnxruntime", device.type, dtype, config, "last")
        yield OnnxRuntimeCuda(info, *_open(paths, model, device))


def exact_logits(model: TransnormerForCausalLM, tokens: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """Compute what a random model's runtimes are compared with.

    Args:
        model: One of `random_model`.
        tokens: Of the prompt, and decoded after it.

    Returns:
        Token ids [2, T]; logits of the float32 model; and how far from those plain PyTorch's in the model's dtype are.
    """
    prompt, decoded = tokens
    device = model.device.type
    ids = torch.randint(model.config.vocab_size, (2, prompt + decoded), generator=torch.Generator().manual_seed(1))
    with use_kernels("pytorch"):
        exact = random_model(model.config, model.lm_head.weight.dtype, device).cast_weights(torch.float32)
        logits = logits_of(TorchRuntime(exact, capture=None), ids, prompt)
        del exact
        release(device)
        return ids, logits, distance(TorchRuntime(model, capture=None), logits, ids, prompt)


def distance(runtime: Runtime, exact: Tensor, ids: Tensor, prompt: int) -> float:
    """Return how far a runtime's `logits_of` are from the exact ones, relative to those."""
    return float((logits_of(runtime, ids, prompt) - exact).norm() / exact.norm())


def allowed(dtype: torch.dtype, plain: float, ratio: float) -> float:
    """Return how far from float32 logits may be: in a half dtype `ratio` times as far as plain PyTorch's."""
    limits = tolerance(str(dtype).removeprefix("torch."))
    return limits.logits if limits.excess is None else ratio * plain


def logits_of(runtime: Runtime, ids: Tensor, prompt: int) -> Tensor:
    """Return logits [B, 1 + decoded, vocab] on the host, after the prompt and after each further one of ids [B, T]."""
    B, T = ids.shape
    logits, state = prefill(runtime, ids[:, :prompt], runtime.initial_state(B))
    found = [logits.cpu()]
    for position in range(prompt, T):
        logits, state = runtime.decode(ids[:, position : position + 1], torch.full((B,), position), state)
        found.append(logits.cpu())
    return torch.stack(found, 1)


def used_bytes(device: str) -> int:
    """Return the memory in use, as the driver counts, without what PyTorch keeps for later; 0 on a CPU."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _write_graphs(folder: Path, model: TransnormerForCausalLM, traced: Traced, lowering: str) -> list[Path]:
    layout = plan_weights(
        TensorSpec(name, str(weight.dtype).removeprefix("torch."), tuple(weight.shape))
        for name, weight in model.named_parameters()
    )
    # ONNX Runtime takes the weights that it is given. But it looks whether the file is there, and folds from it.
    with (folder / WEIGHTS).open("wb") as file:
        file.truncate(layout.total_bytes)
        for name, weight in model.named_parameters():
            if layout.nbytes(name) <= _FOLDED_BYTES:
                file.seek(layout.offset(name))
                file.write(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    builder = GraphBuilder(model.config, Template.of(model.config), lowering=lowering, layout=layout)
    paths = []
    for name in ("prefill", "decode"):
        paths.append(folder / f"{name}.onnx")
        paths[-1].write_bytes(finish_graph(name, builder.build(name, traced[name])).proto)
    return paths


def _open(paths: list[Path], model: TransnormerForCausalLM, device: torch.device) -> Iterator[Program]:
    ort = import_onnxruntime_gpu() if device.type == "cuda" else import_onnxruntime()
    weights = {name: ort.OrtValue.from_dlpack(weight.detach()) for name, weight in model.named_parameters()}
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for path, capture in zip(paths, (False, True), strict=True):
        if device.type == "cuda":
            yield Program.open(ort, str(path), weights, device, stream, capture=capture, threads=None)
        else:
            yield _cpu_program(ort, path, weights, device, capture)


def _cpu_program(ort: Any, path: Path, weights: Mapping[str, Any], device: torch.device, capture: bool) -> Program:
    options = ort.SessionOptions()
    for name, value in weights.items():
        options.add_initializer(name, value)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Program(session, device, run_options=ort.RunOptions if capture else None, weights=weights)
