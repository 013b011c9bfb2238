"""A tiny model with random weights: three heads, LRPE in the first of two layers, and a bundle of it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from tests.plugins.fake import shared_folder
from tests.tnllm_export.runtime.fake_graphs import captured_on_the_cpu
from tnllm_export.build import EngineOptions, build_engines
from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.export import export_bundle
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import Runtime, TorchRuntime, load_runtime
from tnllm_export.runtime.onnxruntime_cuda import OnnxRuntimeCuda
from tnllm_export.runtime.onnxruntime_graphs import PROVIDER, Program

Packaged = Callable[[str], Bundle]


@pytest.fixture(scope="session")
def model() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=97,
        decoder_embed_dim=48,
        decoder_layers=2,
        decoder_attention_heads=3,
        glu_dim=80,
        init_std=0.2,
    )
    return TransnormerForCausalLM(config).requires_grad_(False)


@pytest.fixture(scope="session")
def bundle(model: TransnormerForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(model, folder)
    return export_bundle(folder, tmp_path_factory.mktemp("bundle") / "tiny", dtype="float32")


@pytest.fixture(scope="session")
def packaged(model: TransnormerForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """Return `packaged("cpu")`: the same bundle with AOTInductor packages, compiled once for all workers."""
    shared = shared_folder(tmp_path_factory.getbasetemp())

    def build(device: str) -> Bundle:
        folder = shared / f"packaged-{device}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                source = Path(f"{folder}.source")
                source.mkdir()
                write_checkpoint(model, source)
                partial = export_bundle(source, Path(f"{folder}.partial"), dtype="float32")
                build_engines(partial, "aotinductor", EngineOptions(device=device))
                partial.path.rename(folder)
        return open_bundle(folder)

    return build


@pytest.fixture(
    scope="session",
    params=[
        "torch",
        "torch captured",
        "onnxruntime",
        "onnxruntime slots",
        "aotinductor",
        pytest.param("torch-cuda", marks=pytest.mark.gpu),
        pytest.param("onnxruntime-cuda", marks=pytest.mark.gpu),
        pytest.param("aotinductor-cuda", marks=pytest.mark.gpu),
    ],
)
def runtime(request: pytest.FixtureRequest, model: TransnormerForCausalLM) -> Runtime:
    if request.param == "torch captured":
        return TorchRuntime(model, capture=captured_on_the_cpu)
    if request.param == "torch-cuda":
        return TorchRuntime(copy.deepcopy(model).to("cuda"))
    if request.param.startswith("aotinductor"):
        device = "cuda" if request.param == "aotinductor-cuda" else "cpu"
        packaged: Packaged = request.getfixturevalue("packaged")
        return load_runtime(packaged(device), "aotinductor", device=device)
    bundle: Bundle = request.getfixturevalue("bundle")
    if request.param == "onnxruntime slots":
        return OnnxRuntimeCuda(
            load_runtime(bundle, "onnxruntime").info,
            *map(program_on_the_cpu, (bundle.prefill_path, bundle.decode_path)),
        )
    if request.param == "onnxruntime-cuda":
        if PROVIDER not in onnxruntime.get_available_providers():
            pytest.skip(f"onnxruntime has no {PROVIDER}")
        return load_runtime(bundle, "onnxruntime", device="cuda")
    return load_runtime(bundle, request.param, threads=1)


def program_on_the_cpu(path: Path) -> Program:
    """What `OnnxRuntimeCuda` runs on a GPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Program(session, torch.device("cpu"), run_options=onnxruntime.RunOptions)


def write_checkpoint(model: TransnormerForCausalLM, folder: Path) -> None:
    fields = {"model_type": "transnormer", **json.loads(model.config.model_dump_json())}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
