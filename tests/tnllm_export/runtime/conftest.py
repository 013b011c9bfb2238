"""A tiny model with random weights: three heads, LRPE in the first of two layers, and a bundle of it."""

import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from tests.tnllm_export.runtime.fake_graphs import Capture
from tests.tnllm_export.runtime.runtimes import Packaged, make_runtime
from tests.workers import shared_folder
from tnllm_export.build import EngineOptions, build_engines
from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.export import export_bundle
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import Runtime, TorchRuntime


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
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return make_runtime(request)


@pytest.fixture
def capture() -> Capture:
    return Capture()


@pytest.fixture
def captured(model: TransnormerForCausalLM, capture: Capture) -> TorchRuntime:
    return TorchRuntime(model, capture=capture)


@pytest.fixture
def eager(model: TransnormerForCausalLM) -> TorchRuntime:
    return TorchRuntime(model, capture=None)


def write_checkpoint(model: TransnormerForCausalLM, folder: Path) -> None:
    fields = {"model_type": "transnormer", **json.loads(model.config.model_dump_json())}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
