"""The weights that AOTInductor packages are given: their names, their check, and their end."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tnllm_export.errors import EngineMismatchError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM

MODEL = "causal_lm."
"""What packages write before the weights' names."""


def bundle_name(name: str, constants: Mapping[str, Tensor]) -> str:
    """The bundle's name of a package's constant; the head is the embedding where the bundle has no head."""
    stored = name.removeprefix(MODEL)
    return "model.embed_tokens.weight" if stored == "lm_head.weight" and stored not in constants else stored


def check_constants(constants: Mapping[str, Tensor], config: TransnormerConfig, dtype: torch.dtype, place: str) -> None:
    """Check weights and decay rates before native code reads them, which knows their shapes and asks nobody.

    Args:
        constants: By their names in the bundle.
        config: Of the model that was compiled.
        dtype: Of its weights.
        place: Where they are from.

    Raises:
        EngineMismatchError: One is missing, or has another shape or dtype.
    """
    with torch.device("meta"):
        model = TransnormerForCausalLM(config).cast_weights(dtype)
    way_out = "put the model's own weights there, or export the checkpoint again"
    for name, expected in (model.state_dict() | dict(model.named_buffers())).items():
        stored = bundle_name(name, constants)
        tensor = constants.get(stored)
        if tensor is None:
            raise EngineMismatchError(f"{place}: no tensor {stored}; {way_out}")
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise EngineMismatchError(f"{place}: {stored} is {_kind_of(tensor)}, not {_kind_of(expected)}; {way_out}")


def free_memory(tensors: list[Tensor]) -> None:
    """Give back the memory of tensors to which references are left that nobody will use."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def _kind_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
