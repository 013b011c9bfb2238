"""The manifest: what is written is read, and what was tampered with, is newer or leads elsewhere is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tnllm_export.bundle.manifest import Manifest, parse_manifest
from tnllm_export.errors import BundleCorruptError, BundleVersionError

PATH = Path("bundle/manifest.json")
RECORD = {"sha256": "0" * 64, "bytes": 3}


def listed(manifest: Manifest) -> dict[str, Any]:
    fields = json.loads(manifest.to_text())
    del fields["manifest_sha256"]
    names = ("prefill.onnx", "decode.onnx", "weights.safetensors", "tokenizer.model")
    return fields | {"files": dict.fromkeys(names, RECORD)}


def sealed(fields: dict[str, Any]) -> bytes:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps({"manifest_sha256": hashlib.sha256(canonical.encode()).hexdigest(), **fields}).encode()


def test_what_is_written_is_read(manifest: Manifest) -> None:
    whole = Manifest.model_validate(listed(manifest) | {"parity": {"logits": 1.5e-7, "ok": True, "note": "ä"}})
    assert parse_manifest(whole.to_text().encode(), PATH) == whole


def test_a_newer_schema_asks_for_an_upgrade(manifest: Manifest) -> None:
    text = json.dumps(listed(manifest) | {"schema_version": 2, "something": "new"}).encode()
    with pytest.raises(BundleVersionError, match=r"schema_version is 2, expected at most 1; upgrade tnllm-export"):
        parse_manifest(text, PATH)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"schema_version": "1"}'])
def test_something_else_than_a_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BundleCorruptError, match=r"bundle/manifest\.json: .*; export again|, export again") as caught:
        parse_manifest(text, PATH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", "a//b", "./a", "a\\..\\b"])
def test_a_file_name_that_leads_out_of_the_bundle_is_refused(manifest: Manifest, name: str) -> None:
    fields = listed(manifest)
    with pytest.raises(BundleCorruptError, match="no plain path inside the bundle"):
        parse_manifest(sealed(fields | {"files": fields["files"] | {name: RECORD}}), PATH)
    with pytest.raises(BundleCorruptError, match="no plain path inside the bundle"):
        parse_manifest(sealed(fields | {"tokenizer": name}), PATH)


def test_a_file_without_a_checksum_is_refused(manifest: Manifest) -> None:
    fields = listed(manifest)
    del fields["files"]["decode.onnx"]
    with pytest.raises(BundleCorruptError, match=r"no checksum for decode\.onnx"):
        parse_manifest(sealed(fields), PATH)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int8"}, {"logits": "some"}, {"surprise": 1}, {"files": {"a": {"sha256": "x", "bytes": 1}}}],
)
def test_values_outside_the_schema_are_refused(manifest: Manifest, change: dict[str, Any]) -> None:
    with pytest.raises(BundleCorruptError) as caught:
        parse_manifest(sealed(listed(manifest) | change), PATH)
    assert next(iter(change)) in str(caught.value)


def test_a_change_by_hand_is_noticed(manifest: Manifest) -> None:
    text = Manifest.model_validate(listed(manifest)).to_text().encode()
    with pytest.raises(BundleCorruptError, match="differs from its own checksum"):
        parse_manifest(text.replace(b'"decoder_layers": 2', b'"decoder_layers": 3'), PATH)


def test_a_manifest_is_frozen(manifest: Manifest) -> None:
    with pytest.raises(ValidationError):
        manifest.dtype = "float16"
