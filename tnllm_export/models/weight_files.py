"""Weight files of a checkpoint: which there are, what they hold, and reading them through memory maps.

A tensor's pages count as resident memory once they have been read, file-backed or not. `WeightFile.release` gives
them back, so that a checkpoint of any size can be walked through in the memory of its largest tensor.
"""

import ctypes
import json
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnllm_export.errors import (
    CheckpointNotFoundError,
    UnsafePickleError,
    WeightsMismatchError,
    WeightsUnreadableError,
)

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes that this package knows."""

_REMEDY = "copy or download the file again"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes, as stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a safetensors file keeps a tensor: `offset` counts bytes from the start of the file."""

    info: TensorInfo
    offset: int


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Return what a safetensors file holds, in the order in which it is stored.

    Raises:
        WeightsUnreadableError: The file is absent, truncated, no safetensors file, or has a dtype unknown here.
    """
    _check_is_there(path)
    try:
        # The library knows every way in which a header can lie: overlaps, holes, sizes, a file cut short.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsUnreadableError(f"{path}: not a whole safetensors file ({_one_line(error)}); {_REMEDY}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise WeightsUnreadableError(
                f"{path}: tensor {name} is {entry['dtype']}; expected F32, F16, BF16 or F64, convert the checkpoint"
            )
        info = TensorInfo(name, SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        stored[name] = StoredTensor(info, 8 + length + entry["data_offsets"][0])
    return stored


class WeightFile(Protocol):
    """One weights file, memory-mapped."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What the file holds."""

    def read(self, name: str) -> Tensor:
        """Return a tensor without copying it: a view of the file that must not be written to."""

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the system; whoever still reads it reads the file again."""


def open_weight_file(path: Path) -> WeightFile:
    """Open one file by its suffix, `.safetensors` or else a `torch.save` file, without reading weights.

    Raises:
        WeightsUnreadableError: The file is absent, truncated or not what its name says.
        UnsafePickleError: A `.bin` file holds other objects than tensors.
        WeightsMismatchError: A `.bin` file holds something other than a mapping from names to plain tensors.
    """
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._stored = read_safetensors_header(path)
        # Private and never written: the file itself stays as it is, and so may be read-only.
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        info = self._stored[name].info
        raw = self._mapped(name)
        if raw.storage_offset() % info.dtype.itemsize:
            # Legal, if rare: a header that is no multiple of 8 bytes long. torch can't view such bytes in place.
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)

    def release(self, name: str) -> None:
        release_pages(self._mapped(name))

    def _mapped(self, name: str) -> Tensor:
        stored = self._stored[name]
        return self._bytes[stored.offset : stored.offset + stored.info.nbytes]


class _PickleFile:
    def __init__(self, path: Path) -> None:
        self._tensors = _load_pickle(path)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        release_pages(self._tensors[name])


def _load_pickle(path: Path) -> dict[str, Tensor]:
    _check_is_there(path)
    if not zipfile.is_zipfile(path):
        # A zip's directory stands at its end: a file cut short is no zip file either.
        raise WeightsUnreadableError(
            f"{path}: truncated, or not written by torch.save of torch 1.6 or later; {_REMEDY}"
        )
    try:
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        found = f"the object {foreign[1]}" if foreign else "more than tensors"
        raise UnsafePickleError(
            f"{path}: holds {found}, which could run code when loaded; "
            "expected tensors only, convert the checkpoint to safetensors where you trust it"
        ) from error
    except Exception as error:  # torch names no exception: RuntimeError, EOFError, KeyError have been seen
        raise WeightsUnreadableError(
            f"{path}: not a readable torch.save file ({_one_line(error)}); {_REMEDY}"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsMismatchError(
            f"{path}: holds a {type(content).__name__}; expected a mapping from names to tensors (a state dict)"
        )
    foreign_names = [str(name) for name, value in content.items() if not _is_plain_tensor(value)]
    if foreign_names:
        raise WeightsMismatchError(
            f"{path}: entries that are no plain tensors: {name_some(foreign_names)}; expected a state dict, "
            "save model.state_dict() alone"
        )
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _is_plain_tensor(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu"  # and not "meta": a shape without values


def release_pages(mapped: Tensor) -> None:
    """Drop the resident pages that lie wholly inside a tensor of a private, unwritten memory map."""
    if mapped.numel() == 0 or not sys.platform.startswith("linux"):
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(mapped.shape, mapped.stride(), strict=True))
    first = mapped.data_ptr()
    # Rounded inwards: the pages at both ends belong to the neighbours as well.
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (first + span * mapped.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        # Advice: where the system won't take it, the pages merely stay.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def name_some(names: Sequence[str], limit: int = 10) -> str:
    """List names for a one-line message, at most `limit` of them."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _check_is_there(path: Path) -> None:
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: no such file; {_REMEDY}")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise WeightsUnreadableError(
                f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
