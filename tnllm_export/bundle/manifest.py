"""What `manifest.json` says: schema, and a text form that carries its own checksum."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tnllm_export.errors import BundleCorruptError, BundleVersionError
from tnllm_export.models.config import TransnormerConfig, describe_validation_error

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
SCHEMA_VERSION: Literal[1] = 1

_CHECKSUM = "manifest_sha256"
_REMEDY = "export again, or fetch the bundle again"


def check_relative_name(name: str) -> str:
    """Return a file name of a bundle, or raise ValueError where it leads out of the bundle's folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
        raise ValueError(f"{name!r} is no plain path inside the bundle")
    return name


FileName = Annotated[str, AfterValidator(check_relative_name)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Port(_Record):
    """An input or output of a graph. Symbolic dimensions have names, e.g. ("batch", "time")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphRecord(_Record):
    """One of the two programs."""

    file: FileName
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class Graphs(_Record):
    """The two programs of a bundle."""

    prefill: GraphRecord
    decode: GraphRecord


class FileRecord(_Record):
    """What a file of the bundle must be."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Source(_Record):
    """The checkpoint that was exported: its folder's name (no path) and its number of parameters."""

    checkpoint: str
    parameters: int


class Manifest(_Record):
    """Everything about a bundle but its weights and graphs.

    Attributes:
        schema_version: Of this schema; a reader refuses newer ones.
        config: The model's configuration.
        dtype: Of weights and activations.
        lowering: Which form the two ops have in the graphs.
        logits: Whether prefill gives the logits of the "last" token or of "all".
        opset_imports: Version of each ONNX domain that the graphs use; "" is ai.onnx.
        graphs: Files and ports of both programs.
        weights: External data of both graphs.
        tokenizer: Tokenizer file, or None.
        tools: Versions of what made the bundle, e.g. {"torch": "2.13.0"}.
        source: The checkpoint.
        files: Checksum and size of each file but this one.
        parity: Summary of the last verification, or None.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    config: TransnormerConfig
    dtype: Literal["float32", "float16", "bfloat16"]
    lowering: str
    logits: Literal["last", "all"]
    opset_imports: dict[str, int]
    graphs: Graphs
    weights: FileName = WEIGHTS
    tokenizer: FileName | None = None
    tools: dict[str, str]
    source: Source
    files: dict[FileName, FileRecord] = {}
    parity: dict[str, Any] | None = None

    def to_text(self) -> str:
        """Return the JSON that `parse_manifest` reads: indented, with a checksum of its own content."""
        fields = self.model_dump(mode="json")
        return json.dumps({_CHECKSUM: _checksum(fields), **fields}, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Read a manifest.

    Args:
        text: Content of the file.
        path: Where it stands, for messages.

    Raises:
        BundleVersionError: Written by a newer version of this package.
        BundleCorruptError: Broken, changed after it was written, or naming files outside the bundle.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise BundleCorruptError(f"{path}: broken JSON ({error}); {_REMEDY}") from error
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if not isinstance(version, int):
        raise BundleCorruptError(f"{path}: no schema_version; expected a bundle's manifest, {_REMEDY}")
    if version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"{path}: schema_version is {version}, expected at most {SCHEMA_VERSION}; upgrade tnllm-export to read it"
        )
    if fields.pop(_CHECKSUM, None) != _checksum(fields):
        raise BundleCorruptError(f"{path}: differs from its own checksum, it was changed after export; {_REMEDY}")
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise BundleCorruptError(f"{path}: {describe_validation_error(error)}; {_REMEDY}") from error
    named = {manifest.graphs.prefill.file, manifest.graphs.decode.file, manifest.weights, manifest.tokenizer} - {None}
    unlisted = sorted(str(name) for name in named if name not in manifest.files)
    if unlisted:
        raise BundleCorruptError(f"{path}: no checksum for {', '.join(unlisted)}; {_REMEDY}")
    return manifest


def _checksum(fields: dict[str, Any]) -> str:
    """Hash the content, whatever the order of keys and the white space."""
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
