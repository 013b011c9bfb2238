"""A checkpoint folder in Hugging Face style: written beside its place, renamed when complete."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tnllm_export.errors import WriteError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM, parameter_dtype


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`; it takes that name if the context ends well, else it goes.

    Raises:
        WriteError: `output` exists, or something can't be written.
    """
    if output.exists():
        raise WriteError(f"{output}: exists; choose another folder or remove it first")
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    except OSError as error:
        raise WriteError(f"{output}: can't be written ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(folder: Path, model: TransnormerForCausalLM, tokenizer_model: bytes) -> TransnormerForCausalLM:
    """Write config.json, model.safetensors (bfloat16, LRPE's theta float32) and tokenizer.model.

    Returns:
        The model as stored: weights rounded to bfloat16, computing in float32, on the CPU.
    """
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    write_json(folder / "config.json", _config_fields(model.config))
    tensors = {
        name: parameter.detach().to("cpu", parameter_dtype(name, torch.bfloat16)).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for the owner alone; a checkpoint is for whoever may read its folder.
    (folder / "model.safetensors").chmod(0o644)
    stored = TransnormerForCausalLM(model.config).eval()
    # `named_parameters` names the tied head once, as the embedding.
    stored.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return stored


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_fields(config: TransnormerConfig) -> dict[str, Any]:
    """Return the fields that released checkpoints have, under their names."""
    return {
        "architectures": ["TransnormerForCausalLM"],
        "model_type": "transnormer",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "use_cache": True,
        "decoder_embed_dim": config.decoder_embed_dim,
        "hidden_dim": config.decoder_embed_dim,
        "decoder_layers": config.decoder_layers,
        "decoder_attention_heads": config.decoder_attention_heads,
        "glu_dim": config.glu_dim,
        "no_scale_embedding": config.no_scale_embedding,
        "linear_use_lrpe_list": [int(flag) for flag in config.linear_use_lrpe_list],
        "linear_act_fun": config.linear_act_fun,
        "norm_type": config.norm_type,
        "bias": False,
        "init_std": config.init_std,
    }
