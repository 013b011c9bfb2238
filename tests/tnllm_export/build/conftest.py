"""Bundles to build engines from. TensorRT-RTX builds real ones here, without a GPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from tests.plugins.fake import fake_library
from tests.workers import shared_folder
from tnllm_export.build import EngineOptions, build_engines
from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.demo import checkpoint_folder
from tnllm_export.export import export_bundle
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM

Exported = Callable[..., Bundle]

SMALL = EngineOptions(max_batch=3, max_prompt=65, opt_prompt=63)

MODELS = {
    # LRPE in the first layer only: both kinds of layer.
    "tiny": TransnormerConfig(
        vocab_size=97, decoder_embed_dim=48, decoder_layers=2, decoder_attention_heads=3, glu_dim=80, init_std=0.2
    ),
    # Weights outweigh all else in an engine, as in a real model. Heads as small as those of the model above.
    "wide": TransnormerConfig(
        vocab_size=32000, decoder_embed_dim=1024, decoder_layers=1, decoder_attention_heads=64, glu_dim=2816
    ),
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return `exported("demo", "float16", "matmul")`: a bundle to read, exported once for all workers."""
    shared = shared_folder(tmp_path_factory.getbasetemp())

    def export(model: str, dtype: str, lowering: str) -> Bundle:
        folder = shared / f"exported-{model}-{dtype}-{lowering}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                checkpoint = (
                    checkpoint_folder() if model == "demo" else write_checkpoint(model, Path(f"{folder}.source"))
                )
                export_bundle(checkpoint, folder, dtype=dtype, lowering=lowering)
        return open_bundle(folder)

    return export


@pytest.fixture
def bundle_of(exported: Exported, tmp_path: Path) -> Exported:
    """Return the same as a copy of the test's own, to build into and to change."""

    def copy(model: str, dtype: str, lowering: str) -> Bundle:
        source = exported(model, dtype, lowering).path
        return open_bundle(Path(shutil.copytree(source, tmp_path / source.name)))

    return copy


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our plugin library around kernels that are no code: engines are built with it, not run."""
    return fake_library(tmp_path_factory.getbasetemp())


@pytest.fixture
def built_bundle(exported: Exported, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Bundle:
    """A copy of the tiny float16 bundle with the engines of `SMALL`, which are built once for all workers."""
    source = exported("tiny", "float16", "matmul").path
    folder = source.with_name(f"{source.name}-built")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = Path(shutil.copytree(source, folder.with_name(f"{folder.name}-partial"), dirs_exist_ok=True))
            build_engines(open_bundle(partial), "tensorrt-rtx", SMALL)
            partial.rename(folder)
    return open_bundle(Path(shutil.copytree(folder, tmp_path / "built")))


def write_checkpoint(model: str, folder: Path) -> Path:
    config = MODELS[model]
    torch.manual_seed(0)
    weights = TransnormerForCausalLM(config).state_dict()
    del weights["lm_head.weight"]
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "transnormer", **config.model_dump(mode="json")}))
    return folder
