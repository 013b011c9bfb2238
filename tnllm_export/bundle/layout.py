"""Where each weight stands in `weights.safetensors`, known before the first one is read.

Graphs refer to the file by offset and length (ONNX external data), so the header has to be settled when they are made.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from tnllm_export.models.weight_files import SAFETENSORS_DTYPES, read_safetensors_header

ALIGNMENT = 4096
"""Data starts at a multiple of this, a page: runtimes that map the file get aligned weights."""

DTYPES: Mapping[str, torch.dtype] = {str(d).removeprefix("torch."): d for d in SAFETENSORS_DTYPES.values()}
"""The dtypes by the names that manifests and the command line use, e.g. "bfloat16"."""

_STORED_NAMES = {str(d).removeprefix("torch."): name for name, d in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be stored: its name, its dtype (a key of `DTYPES`) and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredWeight:
    """A tensor and where it stands: `offset` counts bytes from the start of the file."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class WeightsLayout:
    """The plan of a safetensors file.

    Attributes:
        header: The file's first bytes, up to the first tensor's data.
        weights: The tensors by name, in the order in which they stand in the file, without holes.
    """

    header: bytes
    weights: Mapping[str, StoredWeight]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the file's order: the order in which `BundleWriter.write_weights` takes the tensors."""
        return tuple(self.weights)

    @property
    def total_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(weight.spec.nbytes for weight in self.weights.values())

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(weight.spec.numel for weight in self.weights.values())

    def offset(self, name: str) -> int:
        """Bytes from the start of the file to the tensor's data."""
        return self.weights[name].offset

    def nbytes(self, name: str) -> int:
        """Size of the tensor's data in bytes."""
        return self.weights[name].spec.nbytes


def plan_weights(specs: Iterable[TensorSpec]) -> WeightsLayout:
    """Settle a safetensors file: the same specs give the same bytes.

    The format allows no holes between tensors, so alignment comes from padding the header to a page and from the
    order: a tensor whose size is a multiple of a larger power of two stands before one of a smaller. Every tensor thus
    starts at a multiple of the largest power of two (up to a page) that divides its size.

    Raises:
        ValueError: Two tensors of one name, or a dtype that is not in `DTYPES`.
    """
    ordered = sorted(specs, key=_alignment_of_size, reverse=True)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in ordered:
        if spec.name in entries:
            raise ValueError(f"two tensors are named {spec.name}")
        entries[spec.name] = {
            "dtype": _STORED_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces at the end are the format's own means of padding.
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    weights = {}
    position = len(header)
    for spec in ordered:
        weights[spec.name] = StoredWeight(spec, position)
        position += spec.nbytes
    return WeightsLayout(header, weights)


def read_layout(path: Path) -> WeightsLayout:
    """Read the layout of an existing safetensors file from its header.

    Raises:
        CheckpointNotFoundError: There is no such file.
        WeightsUnreadableError: The file is truncated or is no safetensors file.
    """
    stored = read_safetensors_header(path)
    weights = {
        name: StoredWeight(
            TensorSpec(name, str(found.info.dtype).removeprefix("torch."), found.info.shape), found.offset
        )
        for name, found in stored.items()
    }
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = file.read(8 + length)
    return WeightsLayout(header, weights)


def _alignment_of_size(spec: TensorSpec) -> int:
    size = spec.nbytes
    return ALIGNMENT if size == 0 else min(size & -size, ALIGNMENT)
