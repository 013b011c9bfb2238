"""The model's configuration: the released field names, this package's options, and reading `config.json`."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tnllm_export.errors import CheckpointNotFoundError, ConfigError

Activation = Literal["silu", "1+elu", "none"]
Norm = Literal["simplermsnorm", "rmsnorm", "layernorm"]
Decay = Literal["release", "paper"]


def _canonical_activation(name: object) -> object:
    """`swish` is the released configurations' other word for SiLU."""
    return "silu" if name == "swish" else name


ActivationField = Annotated[Activation, BeforeValidator(_canonical_activation)]


class TransnormerConfig(BaseModel):
    """Configuration of a TransNormerLLM. The defaults of the optional fields are the released form.

    Attributes:
        vocab_size: Rows of the embedding.
        decoder_embed_dim: Width d of the hidden state; `hidden_dim` must be equal or absent.
        decoder_layers: Number of layers L.
        decoder_attention_heads: Number of heads H; divides d.
        glu_dim: Inner width of SGLU.
        no_scale_embedding: False multiplies embeddings by sqrt(d).
        linear_use_lrpe_list: One flag per layer, true where queries and keys carry LRPE. Default: layer 0 only.
        linear_act_fun: Activation of queries and keys: "silu" (= "swish"), "1+elu" or "none".
        glu_act_fun: Activation of SGLU's gate: the same names; released: "none".
        norm_type: "simplermsnorm", "rmsnorm" or "layernorm".
        linear_use_gate: Whether attention's output is gated by u; without it the projection is `qkv_proj` [3d, d].
        decay_type: "release" (ALiBi slopes times layer factor) or "paper" (8h/H (1 - l/L)).
        tie_word_embeddings: Whether `lm_head` is the embedding.
        pad_token_id: Token that fills ragged batches.
        bos_token_id: Begin of text; never added on its own.
        eos_token_id: End of text; generation stops there.
        init_std: Standard deviation of freshly initialised weights.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: int = Field(gt=0, lt=2**31)
    decoder_embed_dim: int = Field(gt=0, lt=2**31)
    decoder_layers: int = Field(gt=0, lt=2**31, strict=True)
    decoder_attention_heads: int = Field(gt=0, lt=2**31)
    glu_dim: int = Field(gt=0, lt=2**31)
    hidden_dim: int | None = None
    no_scale_embedding: bool = False
    linear_use_lrpe_list: tuple[bool, ...] = ()
    linear_act_fun: ActivationField = "silu"
    glu_act_fun: ActivationField = "none"
    norm_type: Norm = "simplermsnorm"
    linear_use_gate: bool = True
    decay_type: Decay = "release"
    tie_word_embeddings: bool = True
    bias: Literal[False] = False
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    init_std: float = Field(default=0.02, ge=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill_lrpe_list(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and not fields.get("linear_use_lrpe_list"):
            layers = fields.get("decoder_layers")
            if isinstance(layers, int) and layers > 0:
                fields = {**fields, "linear_use_lrpe_list": (True,) + (False,) * (layers - 1)}
        return fields

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        d, H, L = self.decoder_embed_dim, self.decoder_attention_heads, self.decoder_layers
        if self.hidden_dim not in (None, d):
            raise ValueError(f"hidden_dim is {self.hidden_dim}; expected decoder_embed_dim, {d}")
        if d % H:
            raise ValueError(f"decoder_attention_heads {H} does not divide decoder_embed_dim {d}")
        if len(self.linear_use_lrpe_list) != L:
            raise ValueError(
                f"linear_use_lrpe_list has {len(self.linear_use_lrpe_list)} entries; expected decoder_layers, {L}"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def head_dim(self) -> int:
        """Width V of one head: d / H."""
        return self.decoder_embed_dim // self.decoder_attention_heads

    def key_dim(self, layer: int) -> int:
        """Width K of one head's keys in a layer: LRPE doubles it."""
        return self.head_dim * (2 if self.linear_use_lrpe_list[layer] else 1)

    @property
    def head_sizes(self) -> tuple[tuple[int, int], ...]:
        """K and V of the heads of all layers, each pair once, in order."""
        return tuple(sorted({(self.key_dim(layer), self.head_dim) for layer in range(self.decoder_layers)}))

    def state_shape(self, layer: int, batch: int) -> tuple[int, int, int, int]:
        """Shape [B, H, K, V] of a layer's recurrent state."""
        return batch, self.decoder_attention_heads, self.key_dim(layer), self.head_dim

    def state_elements(self, batch: int) -> int:
        """Numbers in the recurrent states of all layers."""
        return sum(math.prod(self.state_shape(layer, batch)) for layer in range(self.decoder_layers))


# Fields that released configurations carry and that say nothing which changes the computation.
_KNOWN_UNUSED = {"model_type", "architectures", "torch_dtype", "dtype", "use_cache", "auto_map", "transformers_version"}


def load_config(folder: Path) -> tuple[TransnormerConfig, list[str]]:
    """Read `config.json` of a checkpoint folder.

    Returns:
        The configuration, and the names of fields that were ignored because nothing here knows them.

    Raises:
        CheckpointNotFoundError: No such folder, or no `config.json` in it.
        ConfigError: Broken JSON, another architecture, an unknown or inconsistent value.
    """
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such folder; expected a checkpoint folder with config.json")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{folder}: no config.json; expected a Hugging Face style checkpoint folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON or no UTF-8, a number or a depth that Python refuses
        raise ConfigError(f"{path}: broken JSON ({error}); restore the file from the checkpoint's source") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: holds a {type(fields).__name__}; expected a JSON object")
    model_type = fields.get("model_type", "transnormer")
    if model_type != "transnormer":
        raise ConfigError(f"{path}: model_type is {model_type!r}; expected 'transnormer'")
    try:
        config = TransnormerConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation_error(error)}; correct the file") from error
    known = set(TransnormerConfig.model_fields) | _KNOWN_UNUSED
    return config, sorted(name for name in fields if name not in known)


def describe_validation_error(error: ValidationError) -> str:
    """Put what pydantic found into one line."""
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        found = f" (found {item['input']!r})" if field and not isinstance(item["input"], dict) else ""
        parts.append(f"{field}: {message}{found}" if field else message)
    return "; ".join(parts)
