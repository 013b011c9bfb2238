"""Opening and loading checkpoints: every layout of weight files, tied and untied heads, other people's folders."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from tnllm_export.errors import TnllmWarning
from tnllm_export.models.checkpoint import load_model, open_checkpoint, open_weights
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM

FIELDS: dict[str, Any] = {
    "vocab_size": 97,
    "decoder_embed_dim": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "glu_dim": 176,
    "model_type": "transnormer",
}
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
THETA = "model.layers.0.token_mixer.lrpe.theta"


def make_weights(**fields: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model = TransnormerForCausalLM(TransnormerConfig(**(FIELDS | fields)))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(FIELDS | fields))


def shard(weights: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    names = list(weights)
    return [{name: weights[name] for name in names[start::count]} for start in range(count)]


def write_safetensors(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")


def write_other_safetensors(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "step-10000.safetensors")


def write_bin(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def write_sharded_safetensors(folder: Path, weights: dict[str, Tensor]) -> None:
    weight_map = {}
    for number, part in enumerate(shard(weights, 3), 1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_sharded_bin(folder: Path, weights: dict[str, Tensor]) -> None:
    weight_map = {}
    for number, part in enumerate(shard(weights, 3), 1):
        file = f"pytorch_model-{number:05}-of-00003.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


LAYOUTS = [write_safetensors, write_other_safetensors, write_bin, write_sharded_safetensors, write_sharded_bin]


def assert_loads(folder: Path, weights: dict[str, Tensor]) -> TransnormerForCausalLM:
    model = load_model(open_checkpoint(folder))
    loaded = model.state_dict()
    assert loaded
    for name, tensor in loaded.items():
        assert torch.equal(tensor, weights[name].float()), name
    return model


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_of_weight_files_loads(tmp_path: Path, write: Any) -> None:
    weights = make_weights()
    write_config(tmp_path)
    write(tmp_path, weights)
    checkpoint = open_checkpoint(tmp_path)
    assert HEAD not in checkpoint.tensors
    assert set(checkpoint.tensors) == set(weights) - {HEAD}
    assert checkpoint.parameters == sum(t.numel() for name, t in weights.items() if name != HEAD)
    assert checkpoint.tensors[THETA].shape == (2, 1, 32)
    model = assert_loads(tmp_path, weights)
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_loaded_model_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    torch.manual_seed(5)
    saved = TransnormerForCausalLM(TransnormerConfig(**FIELDS)).eval()
    write_config(tmp_path)
    write_bin(tmp_path, saved.state_dict())
    loaded = load_model(open_checkpoint(tmp_path))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], saved(ids)[0])


def test_loading_reports_progress(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_safetensors(tmp_path, make_weights())
    checkpoint = open_checkpoint(tmp_path)
    seen: list[tuple[int, int]] = []
    load_model(checkpoint, progress=lambda stage, done, total, unit="": seen.append((done, total)))
    assert len(seen) == len(checkpoint.tensors)
    assert seen[-1] == (checkpoint.parameters, checkpoint.parameters)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    weights = make_weights()
    write_config(tmp_path)
    write_safetensors(tmp_path, weights)
    write_bin(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    assert_loads(tmp_path, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_theta_and_decay_rates_stay_wide_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write_config(tmp_path)
    write_safetensors(tmp_path, make_weights())
    model = load_model(open_checkpoint(tmp_path), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for name, tensor in model.named_parameters() if not name.endswith("theta")} == {dtype}
    assert dict(model.named_parameters())[THETA].dtype == wide
    rates = dict(model.named_buffers())
    fresh = dict(TransnormerForCausalLM(TransnormerConfig(**FIELDS)).cast_weights(dtype).named_buffers())
    assert len(rates) == len(fresh) == 3
    for name, rate in rates.items():
        assert rate.dtype == wide
        assert torch.equal(rate, fresh[name])


def test_weights_in_bfloat16_load_exactly(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in make_weights().items()}
    write_config(tmp_path)
    write_sharded_bin(tmp_path, weights)
    assert open_checkpoint(tmp_path).tensors[EMBEDDING].dtype == torch.bfloat16
    assert_loads(tmp_path, weights)


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_a_loaded_model_owns_its_weights(tmp_path: Path, write: Any) -> None:
    weights = make_weights()
    write_config(tmp_path)
    write(tmp_path, weights)
    checkpoint = open_checkpoint(tmp_path)
    with torch.no_grad():
        load_model(checkpoint).model.embed_tokens.weight.zero_()
    assert torch.equal(checkpoint.read(EMBEDDING), weights[EMBEDDING])


@pytest.mark.parametrize("write", LAYOUTS)
def test_released_tensors_can_be_read_again(tmp_path: Path, write: Any) -> None:
    weights = make_weights(vocab_size=5000)
    write_config(tmp_path, vocab_size=5000)
    write(tmp_path, weights)
    checkpoint = open_checkpoint(tmp_path)
    names = list(checkpoint.tensors)
    kept = dict(checkpoint.stream(names))
    assert list(kept) == names
    for name in names:
        assert torch.equal(kept[name], weights[name]), name
        assert torch.equal(checkpoint.read(name), weights[name]), name


def test_a_head_without_an_embedding_is_the_embedding(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = TransnormerForCausalLM(TransnormerConfig(**FIELDS))
    write_config(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert EMBEDDING not in load_file(tmp_path / "model.safetensors")
    assert_loads(tmp_path, model.state_dict())


def test_a_head_of_its_own_unties_where_the_configuration_is_silent(tmp_path: Path) -> None:
    weights = make_weights(tie_word_embeddings=False)
    assert not torch.equal(weights[HEAD], weights[EMBEDDING])
    write_config(tmp_path)
    write_safetensors(tmp_path, weights)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tie_word_embeddings
    assert HEAD in checkpoint.tensors
    assert_loads(tmp_path, weights)


def test_a_head_that_the_configuration_ties_is_ignored_and_said_once(tmp_path: Path) -> None:
    weights = make_weights(tie_word_embeddings=False)
    write_config(tmp_path, tie_word_embeddings=True)
    write_safetensors(tmp_path, weights)
    with pytest.warns(TnllmWarning, match=HEAD) as caught:
        checkpoint = open_checkpoint(tmp_path)
    assert len(caught) == 1
    assert HEAD not in checkpoint.tensors


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_bin])
def test_a_users_own_model_survives_and_what_is_ignored_is_said_once(tmp_path: Path, write: Any) -> None:
    weights = make_weights()
    foreign = {
        "model.layers.0.token_mixer.slope_rate": torch.ones(2),
        "model.rotary.inv_freq": torch.ones(16),
        "model._linear_attn_mask": torch.empty(0),
    }
    fields = {"lab": "ours", **dict(reversed(FIELDS.items())), "seed": 7, "auto_map": {"AutoModel": "m.M"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write(tmp_path, weights | foreign)
    with pytest.warns(TnllmWarning) as caught:
        checkpoint = open_checkpoint(tmp_path)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    for name in ("lab", "seed", *foreign):
        assert name in message
    assert not {"vocab_size", "auto_map"} & set(message.replace(",", "").split())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_model(checkpoint).lm_head.weight, weights[EMBEDDING])


@pytest.mark.parametrize("options", [{"norm_type": "layernorm"}, {"linear_use_gate": False}, {"norm_type": "rmsnorm"}])
def test_the_papers_variants_load(tmp_path: Path, options: dict[str, Any]) -> None:
    weights = make_weights(**options)
    write_config(tmp_path, **options)
    write_safetensors(tmp_path, weights)
    assert_loads(tmp_path, weights)


def test_tensors_that_are_not_contiguous_load(tmp_path: Path) -> None:
    weights = make_weights()
    name = "model.layers.1.channel_mixer.l1.weight"
    write_config(tmp_path)
    write_bin(tmp_path, weights | {name: weights[name].t().contiguous().t()})
    assert not open_checkpoint(tmp_path).read(name).is_contiguous()
    assert_loads(tmp_path, weights)


def test_safetensors_that_are_not_aligned_load(tmp_path: Path) -> None:
    weights = make_weights()
    write_config(tmp_path)
    write_safetensors(tmp_path, weights)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    # One space more in the header moves every tensor to an odd address.
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    assert_loads(tmp_path, weights)


def test_one_weights_file_opens_with_a_known_configuration(tmp_path: Path) -> None:
    weights = make_weights()
    save_file(weights | {"constant": torch.ones(3)}, tmp_path / "weights.safetensors")
    checkpoint = open_weights(TransnormerConfig(**FIELDS), tmp_path / "weights.safetensors")
    assert "constant" not in checkpoint.tensors
    assert torch.equal(load_model(checkpoint).state_dict()[EMBEDDING], weights[EMBEDDING])


def test_the_tokenizer_is_found(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_safetensors(tmp_path, make_weights())
    assert open_checkpoint(tmp_path).tokenizer_path is None
    (tmp_path / "tokenizer.json").touch()
    assert open_checkpoint(tmp_path).tokenizer_path == tmp_path / "tokenizer.json"
