"""Checks of what is asked of a runtime, made once at the door and shared by all runtimes."""

import torch
from torch import Tensor

from tnllm_export.errors import PromptError, RequestError
from tnllm_export.runtime.protocol import RuntimeInfo


def check_prefill(vocab_size: int, input_ids: Tensor, lengths: Tensor, positions: Tensor) -> None:
    """Check input_ids [B, T] int64, lengths [B] int32 in 0 … T and positions [B] int64.

    Raises:
        PromptError: A token id outside the vocabulary.
        RequestError: Another shape or dtype, or a length or position out of its range.
    """
    _check_tensor("input_ids", input_ids, torch.int64, (None, None), "[B, T]")
    B, T = input_ids.shape
    _check_tensor("lengths", lengths, torch.int32, (B,), f"[{B}]")
    _check_tensor("positions", positions, torch.int64, (B,), f"[{B}]")
    check_token_ids(vocab_size, input_ids)
    _check_range("lengths", lengths, T)
    _check_range("positions", positions, None)


def check_decode(vocab_size: int, input_ids: Tensor, positions: Tensor) -> None:
    """Check input_ids [B, 1] int64 and positions [B] int64; raises what `check_prefill` raises."""
    _check_tensor("input_ids", input_ids, torch.int64, (None, 1), "[B, 1]")
    B = input_ids.shape[0]
    _check_tensor("positions", positions, torch.int64, (B,), f"[{B}]")
    check_token_ids(vocab_size, input_ids)
    _check_range("positions", positions, None)


def check_decode_ahead(info: RuntimeInfo, input_ids: Tensor | None, positions: Tensor | None) -> None:
    """Check what `RunsAhead.decode_ahead` takes, reading nothing from a device; raises what `check_prefill` raises."""
    if not info.runs_ahead:
        raise RequestError(f"{info.name} on {info.device} does not run ahead; decode with tokens that are known")
    if positions is None:
        if input_ids is not None:
            _check_tensor("input_ids", input_ids, torch.int64, (None, 1), "[B, 1]")
        return
    if input_ids is None:
        raise RequestError("positions given without input_ids; expected both, input_ids alone, or neither")
    check_decode(info.config.vocab_size, input_ids, positions)


def check_token_ids(vocab_size: int, token_ids: Tensor) -> None:
    """Raise PromptError, naming the first offender, unless 0 <= id < vocab_size for every id of any shape."""
    low, high = _extremes(token_ids)
    if low >= 0 and high < vocab_size:
        return
    where = ((token_ids < 0) | (token_ids >= vocab_size)).nonzero()[0].tolist()
    raise PromptError(
        f"token id {int(token_ids[tuple(where)])} at {where} is outside the vocabulary; "
        f"expected 0 … {vocab_size - 1}: encode the text with this model's tokenizer"
    )


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise RequestError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor {layout} of {dtype}")
    if tensor.dtype != dtype:
        raise RequestError(f"{name} is {tensor.dtype}; expected {dtype}: convert it with .to({dtype})")
    found = tensor.shape
    fits = found == shape or (len(found) == len(shape) and all(map(_fits, found, shape)))
    if not fits or 0 in found:
        raise RequestError(f"{name} has shape {list(tensor.shape)}; expected {layout} with nothing empty")


def _fits(found: int, wanted: int | None) -> bool:
    return wanted is None or found == wanted


def _check_range(name: str, tensor: Tensor, largest: int | None) -> None:
    low, high = _extremes(tensor)
    if low < 0:
        raise RequestError(f"{name} holds {low}; expected nothing below 0")
    if largest is not None and high > largest:
        raise RequestError(f"{name} holds {high}; expected at most {largest}, the columns of input_ids")


def _extremes(tensor: Tensor) -> tuple[int, int]:
    """The least and the greatest number. For one token of a few sequences, by far most calls, Python is quickest."""
    count = tensor.numel()
    if count == 1:
        number = int(tensor.item())
        return number, number
    if count <= 64 and tensor.is_cpu:
        numbers = tensor.flatten().tolist()
        return min(numbers), max(numbers)
    low, high = torch.aminmax(tensor)
    return int(low), int(high)
