"""The runtimes that tests of this folder are repeated with, by name."""

import copy
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch

from tests.tnllm_export.runtime.fake_graphs import captured_on_the_cpu
from tnllm_export.bundle import Bundle
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import Runtime, TorchRuntime, load_runtime
from tnllm_export.runtime.onnxruntime_cuda import OnnxRuntimeCuda
from tnllm_export.runtime.onnxruntime_graphs import PROVIDER, Program

Packaged = Callable[[str], Bundle]


def make_runtime(request: pytest.FixtureRequest) -> Runtime:
    """A new runtime of the fixtures' model: the one that the parameter of the asking fixture names."""
    name: str = request.param
    if name in ("torch captured", "torch-cuda"):
        model: TransnormerForCausalLM = request.getfixturevalue("model")
        if name == "torch captured":
            return TorchRuntime(model, capture=captured_on_the_cpu)
        return TorchRuntime(copy.deepcopy(model).to("cuda"))
    if name.startswith("aotinductor"):
        device = "cuda" if name == "aotinductor-cuda" else "cpu"
        packaged: Packaged = request.getfixturevalue("packaged")
        return load_runtime(packaged(device), "aotinductor", device=device)
    bundle: Bundle = request.getfixturevalue("bundle")
    if name == "onnxruntime slots":
        return OnnxRuntimeCuda(
            load_runtime(bundle, "onnxruntime").info,
            *map(program_on_the_cpu, (bundle.prefill_path, bundle.decode_path)),
        )
    if name == "onnxruntime-cuda":
        if PROVIDER not in onnxruntime.get_available_providers():
            pytest.skip(f"onnxruntime has no {PROVIDER}")
        return load_runtime(bundle, "onnxruntime", device="cuda")
    return load_runtime(bundle, name, threads=1)


def program_on_the_cpu(path: Path) -> Program:
    """What `OnnxRuntimeCuda` runs on a GPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Program(session, torch.device("cpu"), run_options=onnxruntime.RunOptions)
