"""The waist: export writes bundles, everything else only reads them."""

from tnllm_export.bundle.layout import DTYPES, StoredWeight, TensorSpec, WeightsLayout, plan_weights, read_layout
from tnllm_export.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    WEIGHTS,
    FileRecord,
    GraphRecord,
    Graphs,
    Manifest,
    Port,
    Source,
)
from tnllm_export.bundle.reader import Bundle, is_bundle, open_bundle
from tnllm_export.bundle.writer import BundleWriter

__all__ = [
    "DTYPES",
    "MANIFEST",
    "SCHEMA_VERSION",
    "WEIGHTS",
    "Bundle",
    "BundleWriter",
    "FileRecord",
    "GraphRecord",
    "Graphs",
    "Manifest",
    "Port",
    "Source",
    "StoredWeight",
    "TensorSpec",
    "WeightsLayout",
    "is_bundle",
    "open_bundle",
    "plan_weights",
    "read_layout",
]
