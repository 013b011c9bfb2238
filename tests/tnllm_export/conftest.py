"""A tiny checkpoint with a tokenizer, and its bundle: what the command line and the API are tried on."""

import io
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.export import export_bundle
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.verify.cases import SAMPLE_TEXT

VOCAB = 320


def write_checkpoint(folder: Path, *, tokenizer: bool) -> Path:
    """Two layers, three heads, random float32 weights."""
    folder.mkdir()
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=VOCAB,
        decoder_embed_dim=48,
        decoder_layers=2,
        decoder_attention_heads=3,
        glu_dim=64,
        init_std=0.2,
    )
    weights = TransnormerForCausalLM(config).state_dict()
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(config.model_dump_json())
    if tokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SAMPLE_TEXT.splitlines()),
            model_writer=model,
            vocab_size=VOCAB,
            model_type="bpe",
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("text") / "checkpoint", tokenizer=True)


@pytest.fixture(scope="session")
def text_bundle(text_checkpoint: Path) -> Bundle:
    return export_bundle(text_checkpoint, text_checkpoint.parent / "bundle", lowering="contrib")


@pytest.fixture(scope="session")
def ids_bundle(text_bundle: Bundle) -> Bundle:
    """The same bundle without its tokenizer."""
    folder = text_bundle.path.parent / "ids"
    shutil.copytree(text_bundle.path, folder)
    (folder / "tokenizer.model").unlink()
    files = {name: record for name, record in text_bundle.manifest.files.items() if name != "tokenizer.model"}
    manifest = text_bundle.manifest.model_copy(update={"tokenizer": None, "files": files})
    (folder / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    return open_bundle(folder)
