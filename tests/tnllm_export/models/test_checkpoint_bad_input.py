"""Checkpoints that can't be used: each is refused in one line that names the thing and the remedy."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tnllm_export.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    NonFiniteWeightsError,
    UnsafePickleError,
    WeightsMismatchError,
    WeightsUnreadableError,
)
from tnllm_export.models.checkpoint import load_model, open_checkpoint
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
EMBEDDING = "model.embed_tokens.weight"
PROJECTION = "model.layers.2.channel_mixer.l3.weight"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(5)
    model = TransnormerForCausalLM(TransnormerConfig(**FIELDS))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


def refused(folder: Path, error: type[CheckpointError], *named: str) -> str:
    with pytest.raises(error) as caught:
        load_model(open_checkpoint(folder))
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message
    return message


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointNotFoundError, "nowhere", "no such folder")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, CheckpointNotFoundError, str(tmp_path), "no config.json")


def test_no_weights(folder: Path) -> None:
    refused(folder, CheckpointNotFoundError, str(folder), "model.safetensors", "pytorch_model.bin")


def test_several_files_that_could_be_the_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(weights, folder / name)
    refused(folder, CheckpointNotFoundError, "a.safetensors, b.safetensors", "model.safetensors")


def test_missing_extra_and_misshaped_tensors_are_listed_by_name(folder: Path, weights: dict[str, Tensor]) -> None:
    del weights[PROJECTION]
    weights["model.layers.3.surprise.weight"] = torch.ones(2)
    weights[EMBEDDING] = weights["lm_head.weight"] = torch.ones(96, 64)
    weights["lm_head.weight"] = weights[EMBEDDING].clone()
    save_file(weights, folder / "model.safetensors")
    refused(
        folder,
        WeightsMismatchError,
        f"missing: {PROJECTION}",
        "extra: model.layers.3.surprise.weight",
        f"mis-shaped: {EMBEDDING} [96, 64] (expected [97, 64])",
    )


def test_a_long_list_of_tensors_is_cut(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file({EMBEDDING: weights[EMBEDDING]}, folder / "model.safetensors")
    message = refused(folder, WeightsMismatchError, "missing: model.layers.0", "and 6 more")
    assert message.count("model.layers") == 10


def test_tensors_of_integers(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights | {PROJECTION: torch.ones(64, 176, dtype=torch.int8)}, folder / "model.safetensors")
    refused(folder, WeightsMismatchError, f"not floating-point: {PROJECTION} int8")


def test_a_head_that_is_said_to_be_there_but_is_not(folder: Path, weights: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(FIELDS | {"tie_word_embeddings": False}))
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    refused(folder, WeightsMismatchError, "missing: lm_head.weight")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_truncated_safetensors(folder: Path, weights: dict[str, Tensor], kept: float) -> None:
    path = folder / "model.safetensors"
    save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(folder, WeightsUnreadableError, str(path), "again")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_truncated_bin_shard(folder: Path, weights: dict[str, Tensor], kept: float) -> None:
    names = sorted(weights)
    for shard, part in (("first.bin", names[::2]), ("second.bin", names[1::2])):
        torch.save({name: weights[name] for name in part}, folder / shard)
    weight_map = dict.fromkeys(names[::2], "first.bin") | dict.fromkeys(names[1::2], "second.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path = folder / "second.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(folder, WeightsUnreadableError, str(path), "again")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"garbage" * 1000, b"\0" * 4096, b"PK\x03\x04" + b"\0" * 4096, b"\xff" * 4096])
def test_garbage_in_place_of_weights(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refused(folder, WeightsUnreadableError, str(folder / name), "again")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_in_place_of_weights(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, WeightsUnreadableError, name, "git lfs pull")


def test_a_dtype_that_nobody_trains_in(folder: Path, weights: dict[str, Tensor]) -> None:
    wide = {name: tensor.to(torch.complex64) if name == PROJECTION else tensor for name, tensor in weights.items()}
    save_file(wide, folder / "model.safetensors")
    refused(folder, WeightsUnreadableError, PROJECTION, "C64", "F32")


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


def test_a_pickle_with_foreign_objects_is_not_run(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights | {"hook": Foreign()}, folder / "pytorch_model.bin")
    refused(folder, UnsafePickleError, "pytorch_model.bin", "exec", "safetensors")


def test_a_whole_pickled_model_is_not_loaded(folder: Path) -> None:
    torch.save(TransnormerForCausalLM(TransnormerConfig(**FIELDS)), folder / "pytorch_model.bin")
    refused(folder, UnsafePickleError, "pytorch_model.bin", "TransnormerForCausalLM")


def test_a_plain_pickle_is_not_loaded(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, WeightsUnreadableError, "pytorch_model.bin", "torch.save")


def test_a_bin_that_holds_no_state_dict(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save([weights], folder / "pytorch_model.bin")
    refused(folder, WeightsMismatchError, "pytorch_model.bin", "list", "state dict")


def test_a_training_checkpoint_around_the_state_dict(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"model": weights, "step": 3}, folder / "pytorch_model.bin")
    refused(folder, WeightsMismatchError, "pytorch_model.bin", "model, step", "state_dict()")


def test_a_bin_of_shapes_without_values(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save({name: tensor.to("meta") for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    refused(folder, WeightsMismatchError, "no plain tensors", EMBEDDING)


def test_an_index_that_names_an_absent_shard(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "one.safetensors")
    weight_map = dict.fromkeys(weights, "one.safetensors") | {PROJECTION: "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, CheckpointNotFoundError, "two.safetensors", "model.safetensors.index.json")


def test_an_index_that_names_an_absent_tensor(folder: Path, weights: dict[str, Tensor]) -> None:
    del weights[PROJECTION]
    save_file(weights, folder / "one.safetensors")
    weight_map = dict.fromkeys([*weights, PROJECTION], "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, WeightsMismatchError, "model.safetensors.index.json", PROJECTION)


def test_an_index_that_leads_out_of_the_folder(folder: Path) -> None:
    index = {"weight_map": {EMBEDDING: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, WeightsUnreadableError, "../elsewhere.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_broken_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, WeightsUnreadableError, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "called"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_weights_that_are_not_finite(
    folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, value: float, called: str
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    weights[PROJECTION][63, 175] = value
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, NonFiniteWeightsError, PROJECTION, called)


def test_weights_too_large_for_float16(folder: Path, weights: dict[str, Tensor]) -> None:
    weights[PROJECTION][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(NonFiniteWeightsError, match=rf"{PROJECTION}: holds 100000, .* float16 .* bfloat16"):
        load_model(checkpoint, torch.float16)
    assert float(load_model(checkpoint, torch.bfloat16).state_dict()[PROJECTION].max()) == pytest.approx(1e5, rel=0.01)
