"""A bundle in one line, and in a few JSON fields."""

from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

if TYPE_CHECKING:
    from tnllm_export.bundle import Bundle


def describe_bundle(bundle: "Bundle") -> str:
    """Return where a bundle is and what it holds, e.g. `out: 1.02 B parameters, float32, lowering contrib, 4.1 GB`."""
    manifest = bundle.manifest
    size = decimal(sum(record.bytes for record in manifest.files.values()))
    parameters = count(manifest.source.parameters)
    return f"{bundle.path}: {parameters} parameters, {manifest.dtype}, lowering {manifest.lowering}, {size}"


def summarize_bundle(bundle: "Bundle") -> dict[str, Any]:
    """Return the same for a program."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "checkpoint": manifest.source.checkpoint,
        "parameters": manifest.source.parameters,
        "dtype": manifest.dtype,
        "lowering": manifest.lowering,
        "logits": manifest.logits,
        "tokenizer": manifest.tokenizer,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "files": {name: record.bytes for name, record in manifest.files.items()},
    }


def count(number: int) -> str:
    """Return a large number with three digits: 1.02 B, 385 M, 4.1 k."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
