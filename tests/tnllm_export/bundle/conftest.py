"""A tiny bundle: real weights and manifest, graphs of a few bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tnllm_export.bundle import (
    Bundle,
    BundleWriter,
    GraphRecord,
    Graphs,
    Manifest,
    Port,
    Source,
    TensorSpec,
    WeightsLayout,
    plan_weights,
)
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM

CONFIG = TransnormerConfig(
    vocab_size=97, decoder_embed_dim=64, decoder_layers=2, decoder_attention_heads=2, glu_dim=176
)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(5)
    model = TransnormerForCausalLM(CONFIG)
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


@pytest.fixture
def layout(weights: dict[str, Tensor]) -> WeightsLayout:
    return plan_weights(TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in weights.items())


@pytest.fixture
def manifest() -> Manifest:
    ids = Port(name="input_ids", dtype="int64", shape=("batch", "time"))
    logits = Port(name="logits", dtype="float32", shape=("batch", 97))
    return Manifest(
        config=CONFIG,
        dtype="float32",
        lowering="contrib",
        logits="last",
        opset_imports={"": 21, "com.microsoft": 1},
        graphs=Graphs(
            prefill=GraphRecord(file="prefill.onnx", inputs=(ids,), outputs=(logits,)),
            decode=GraphRecord(file="decode.onnx", inputs=(ids,), outputs=(logits,)),
        ),
        tokenizer="tokenizer.model",
        tools={"torch": "2.13.0"},
        source=Source(checkpoint="tiny", parameters=12),
    )


@pytest.fixture
def write_bundle(
    tmp_path: Path, weights: dict[str, Tensor], layout: WeightsLayout, manifest: Manifest
) -> Callable[..., Bundle]:
    tokenizer = tmp_path / "some-tokenizer"
    tokenizer.write_bytes(b"pieces")

    def in_order() -> Iterator[tuple[str, Tensor]]:
        return ((name, weights[name]) for name in layout.names)

    def write(path: Path, overwrite: bool = False, decode: bytes = b"decode graph") -> Bundle:
        with BundleWriter(path, overwrite) as writer:
            writer.write_weights(layout, in_order())
            writer.write_bytes("prefill.onnx", b"prefill graph")
            writer.write_bytes("decode.onnx", decode)
            writer.copy_file(tokenizer, "tokenizer.model")
            return writer.commit(manifest)

    return write


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where bundles go: a folder that holds nothing else."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder
