"""From a checkpoint to a bundle: the only place that knows both sides of it."""

from tnllm_export.export.pipeline import export_bundle

__all__ = ["export_bundle"]
