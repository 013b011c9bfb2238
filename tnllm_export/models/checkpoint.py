"""Opening a checkpoint folder, checking it against the model, and loading it."""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tnllm_export.errors import (
    CheckpointNotFoundError,
    TnllmWarning,
    WeightsMismatchError,
    WeightsUnreadableError,
)
from tnllm_export.kernels.contract import accumulator_dtype
from tnllm_export.models.config import TransnormerConfig, load_config
from tnllm_export.models.decay import slope_rates
from tnllm_export.models.finite import check_cast
from tnllm_export.models.modeling import GatedLinearAttention, TransnormerForCausalLM, parameter_dtype
from tnllm_export.models.tokenizer import find_tokenizer
from tnllm_export.models.weight_files import TensorInfo, WeightFile, name_some, open_weight_file
from tnllm_export.progress import Progress, silent

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"

# Constants that other implementations keep in their state dict; we compute them from the configuration.
_IGNORABLE = re.compile(r"(^|\.)(slope_rate|slopes|inv_freq|position_ids|_?(linear_)?attn_mask)$")

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, checked against the model. No weight is in memory.

    Attributes:
        folder: The checkpoint's folder.
        config: The configuration; `tie_word_embeddings` is what the weights show where `config.json` does not say it.
        tensors: What the model needs, by state-dict name in the model's order. A tied head is left out.
        tokenizer_path: `tokenizer.model` or `tokenizer.json`, or None.
    """

    folder: Path
    config: TransnormerConfig
    tensors: Mapping[str, TensorInfo]
    tokenizer_path: Path | None
    _stored: "Mapping[str, _Stored]" = field(repr=False)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(torch.Size(info.shape).numel() for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored: a view of the memory-mapped file, not to be written to."""
        stored = self._stored[name]
        return stored.file.read(stored.info.name)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from resident memory, once it has been used."""
        stored = self._stored[name]
        stored.file.release(stored.info.name)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors one by one, each released when the next is asked for."""
        for name in names:
            yield name, self.read(name)
            self.release(name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder's configuration and the headers of its weight files, and check that they fit.

    Weights are `model.safetensors`, its index with shards, `pytorch_model.bin`, its index with shards, or a single
    other safetensors file, in this order. What is ignored is said once, by a TnllmWarning.

    Raises:
        CheckpointNotFoundError: No such folder, or no configuration or weights in it, or an absent shard.
        ConfigError: The configuration is broken.
        WeightsUnreadableError: A weights file is truncated or is not what its name says.
        UnsafePickleError: A `.bin` file holds other objects than tensors.
        WeightsMismatchError: Tensors are missing, extra, mis-shaped or no floating-point numbers.
    """
    config, unknown_fields = load_config(folder)
    stored = _find_weights(folder)
    config, ignored = _settle_head(config, stored)
    expected = expected_tensors(config)
    constants = [name for name in stored if name not in expected and _IGNORABLE.search(name)]
    for name in constants:
        del stored[name]
    _check_fit(folder, stored, expected)
    _say_ignored(folder, unknown_fields, constants + ignored)
    return _checkpoint(folder, config, stored, expected)


def open_weights(config: TransnormerConfig, weights: Path) -> Checkpoint:
    """Open one weights file for a configuration that is known already, e.g. a bundle's. Other tensors are left alone.

    Raises:
        CheckpointError: As `open_checkpoint` does for weights.
    """
    file = open_weight_file(weights)
    expected = expected_tensors(config)
    stored = {name: _Stored(file, info) for name, info in file.infos.items() if name in expected}
    _check_fit(weights, stored, expected)
    return _checkpoint(weights.parent, config, stored, expected)


def expected_tensors(config: TransnormerConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor of the model's state dict, in its order. A tied head is left out."""
    model = _hollow_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[_HEAD]
    return shapes


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, progress: Progress = silent
) -> TransnormerForCausalLM:
    """Load the model in evaluation mode, with its own copy of the weights.

    Args:
        checkpoint: From `open_checkpoint`.
        dtype: Of weights and activations; theta and the decay rates stay float32 (float64 for float64).
        progress: Told of the parameters that have been loaded.

    Raises:
        NonFiniteWeightsError: A weight is NaN or infinite, or too large for `dtype`.
    """
    config = checkpoint.config
    model = _hollow_model(config)  # each parameter is then put in its place
    weights = {}
    done = 0
    for name, stored in checkpoint.stream(checkpoint.tensors):
        weights[name] = stored.to(parameter_dtype(name, dtype), copy=True, memory_format=torch.contiguous_format)
        check_cast(name, stored, weights[name])
        done += stored.numel()
        progress("loading weights", done, checkpoint.parameters, "parameters")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    # The decay rates are in no checkpoint: they follow from the configuration.
    mixers = [module for module in model.modules() if isinstance(module, GatedLinearAttention)]
    for layer, mixer in enumerate(mixers):
        rates = slope_rates(config.decay_type, layer, config.decoder_layers, config.decoder_attention_heads)
        mixer.slope_rate = rates.to(accumulator_dtype(dtype))
    return model.eval()


class _Hollow(TorchFunctionMode):
    """Makes matrices without memory and draws nothing into them.

    `torch.device("meta")` alone computes what little there is to compute in Python, and loads torch's compiler for it,
    which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `torch.empty` and the functions of `torch.nn.init`."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def _hollow_model(config: TransnormerConfig) -> TransnormerForCausalLM:
    """Return a model that has names and shapes but holds no weights."""
    with _Hollow():
        return TransnormerForCausalLM(config)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint: the file it is in, and what the file says of it."""

    file: WeightFile
    info: TensorInfo


def _find_weights(folder: Path) -> dict[str, _Stored]:
    for pattern in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / pattern, folder / f"{pattern}.index.json"
        if single.is_file():
            return _open_files([single])
        if index.is_file():
            return _open_shards(index)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return _open_files(others)
    found = name_some([path.name for path in others]) or "none"
    raise CheckpointNotFoundError(
        f"{folder}: no weights by a known name (other safetensors files: {found}); "
        "expected model.safetensors or pytorch_model.bin, or one of the two's .index.json with its shards"
    )


def _open_shards(index: Path) -> dict[str, _Stored]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        owners = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsUnreadableError(
            f"{index}: broken ({type(error).__name__}); expected JSON with a weight_map from tensors to files"
        ) from error
    shards = sorted(set(owners.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise WeightsUnreadableError(f"{index}: names {shard}; expected files in the index's own folder")
        if not (index.parent / shard).is_file():
            raise CheckpointNotFoundError(f"{index.parent / shard}: no such file, but {index.name} names it; fetch it")
    stored = _open_files([index.parent / shard for shard in shards])
    absent = [name for name in owners if name not in stored]
    if absent:
        raise WeightsMismatchError(
            f"{index}: names tensors that its files don't hold: {name_some(absent)}; fetch index and files again"
        )
    return stored


def _open_files(paths: list[Path]) -> dict[str, _Stored]:
    files = [open_weight_file(path) for path in paths]
    return {name: _Stored(file, info) for file in files for name, info in file.infos.items()}


def _settle_head(config: TransnormerConfig, stored: dict[str, _Stored]) -> tuple[TransnormerConfig, list[str]]:
    """Decide whether the head is the embedding, and drop one of two that are the same.

    `config.json` decides where it says so; otherwise a head of its own is one that differs from the embedding.

    Returns:
        The configuration with `tie_word_embeddings` settled, and what is ignored although it holds something new.
    """
    said = config.tie_word_embeddings if "tie_word_embeddings" in config.model_fields_set else None
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    ignored: list[str] = []
    if said is False:
        return config, ignored
    if head is not None and embedding is not None:
        same = _same_content(head, embedding)
        if not same and said is None:
            return config.model_copy(update={"tie_word_embeddings": False}), ignored
        del stored[_HEAD]
        if not same:
            ignored.append(f"{_HEAD} (config.json ties it to the embedding)")
    elif head is not None:
        # safetensors' save_model keeps one name of a shared tensor, the alphabetically first: the head's.
        del stored[_HEAD]
        stored[_EMBEDDING] = head
    return config.model_copy(update={"tie_word_embeddings": True}), ignored


def _same_content(one: _Stored, other: _Stored) -> bool:
    if (one.info.dtype, one.info.shape) != (other.info.dtype, other.info.shape):
        return False
    # Compared as bits, so that NaN equals itself, and in pieces, so that a difference is found early.
    mine, theirs = (stored.file.read(stored.info.name).reshape(-1).view(torch.uint8) for stored in (one, other))
    pieces = zip(torch.split(mine, 1 << 24), torch.split(theirs, 1 << 24), strict=True)
    same = all(torch.equal(*pair) for pair in pieces)
    for stored in (one, other):
        stored.file.release(stored.info.name)
    return same


def _check_fit(where: Path, stored: dict[str, _Stored], expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    common = [(name, stored[name].info) for name in expected if name in stored]
    misshaped = [
        f"{name} {list(info.shape)} (expected {list(expected[name])})"
        for name, info in common
        if info.shape != expected[name]
    ]
    not_float = [
        f"{name} {str(info.dtype).removeprefix('torch.')}" for name, info in common if info.dtype not in _FLOAT_DTYPES
    ]
    findings = (
        ("missing", missing),
        ("extra", extra),
        ("mis-shaped", misshaped),
        ("not floating-point", not_float),
    )
    listed = "; ".join(f"{what}: {name_some(names)}" for what, names in findings if names)
    if listed:
        raise WeightsMismatchError(
            f"{where}: weights don't fit config.json; {listed}; correct config.json or the weights"
        )


def _say_ignored(folder: Path, fields: list[str], tensors: list[str]) -> None:
    parts = []
    if fields:
        parts.append(f"unknown fields of config.json: {name_some(fields)}")
    if tensors:
        parts.append(f"tensors: {name_some(tensors)}")
    if parts:
        warnings.warn(f"{folder}: ignored {'; '.join(parts)}", TnllmWarning, stacklevel=3)


def _checkpoint(
    folder: Path, config: TransnormerConfig, stored: dict[str, _Stored], expected: dict[str, tuple[int, ...]]
) -> Checkpoint:
    ordered = {name: stored[name] for name in expected}
    return Checkpoint(
        folder=folder,
        config=config,
        tensors={name: TensorInfo(name, found.info.dtype, found.info.shape) for name, found in ordered.items()},
        tokenizer_path=find_tokenizer(folder),
        _stored=ordered,
    )
