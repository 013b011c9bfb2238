"""Reading `config.json`: the released form, the paper's options, other people's files, and broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from tnllm_export.errors import CheckpointNotFoundError, ConfigError
from tnllm_export.models.config import TransnormerConfig, load_config

RELEASED: dict[str, Any] = {
    "vocab_size": 97,
    "decoder_embed_dim": 64,
    "hidden_dim": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "glu_dim": 176,
    "linear_act_fun": "swish",
    "norm_type": "simplermsnorm",
    "model_type": "transnormer",
}


def write_config(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(RELEASED | changes))
    return folder


def test_defaults_are_the_released_form(tmp_path: Path) -> None:
    config, ignored = load_config(write_config(tmp_path))
    assert ignored == []
    assert config.linear_use_lrpe_list == (True, False, False)
    assert (config.linear_act_fun, config.glu_act_fun) == ("silu", "none")
    assert (config.decay_type, config.linear_use_gate, config.tie_word_embeddings) == ("release", True, True)
    assert config.state_shape(0, batch=2) == (2, 2, 64, 32)
    assert config.state_shape(1, batch=2) == (2, 2, 32, 32)


def test_the_order_of_fields_does_not_matter(tmp_path: Path) -> None:
    here, _ = load_config(write_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(RELEASED.items()))))
    assert load_config(tmp_path)[0] == here


def test_unknown_fields_are_reported_and_ignored(tmp_path: Path) -> None:
    config, ignored = load_config(write_config(tmp_path, my_lab="x", attention_dropout_schedule=[1, 2]))
    assert ignored == ["attention_dropout_schedule", "my_lab"]
    assert config == load_config(write_config(tmp_path))[0]


@pytest.mark.parametrize(
    "options",
    [
        {"linear_act_fun": "1+elu"},
        {"glu_act_fun": "silu"},
        {"norm_type": "layernorm"},
        {"linear_use_gate": False},
        {"decay_type": "paper"},
        {"linear_use_lrpe_list": [1, 1, 0]},
        {"tie_word_embeddings": False},
    ],
)
def test_the_papers_options_are_read_and_survive_json(tmp_path: Path, options: dict[str, Any]) -> None:
    config, _ = load_config(write_config(tmp_path, **options))
    assert config != load_config(write_config(tmp_path))[0]
    assert TransnormerConfig.model_validate_json(config.model_dump_json()) == config


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nowhere: no such folder"):
        load_config(tmp_path / "nowhere")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", '{"vocab_size": 97,}', "\N{BYTE ORDER MARK}", "[1, 2]", "null", "[" * 100_000, "9" * 5000]
)
def test_broken_json_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: ") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_type": "batchnorm"}, ["norm_type", "batchnorm", "simplermsnorm", "rmsnorm", "layernorm"]),
        ({"linear_act_fun": "relu"}, ["linear_act_fun", "relu", "silu", "1+elu"]),
        ({"glu_act_fun": "gelu"}, ["glu_act_fun", "gelu"]),
        ({"decoder_attention_heads": 5}, ["decoder_attention_heads 5", "decoder_embed_dim 64"]),
        ({"hidden_dim": 128}, ["hidden_dim is 128", "64"]),
        ({"linear_use_lrpe_list": [1]}, ["linear_use_lrpe_list has 1", "3"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"vocab_size": 10**30}, ["vocab_size", "2147483648"]),
        ({"init_std": -0.02}, ["init_std", "-0.02"]),
        ({"init_std": float("nan")}, ["init_std", "nan"]),
        ({"decoder_layers": 0}, ["decoder_layers", "0"]),
        ({"decoder_layers": "3"}, ["decoder_layers", "integer", "'3'"]),
        ({"bias": True}, ["bias"]),
        ({"eos_token_id": 97}, ["eos_token_id 97", "97"]),
        ({"model_type": "llama"}, ["llama", "transnormer"]),
    ],
)
def test_a_value_that_can_not_be_is_named(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path, **changes))
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in RELEASED.items() if k != "glu_dim"}))
    with pytest.raises(ConfigError, match="glu_dim"):
        load_config(tmp_path)
