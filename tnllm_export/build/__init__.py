"""Turning a bundle into TensorRT engines. Importing this package imports no TensorRT."""

from tnllm_export.build.options import EngineOptions
from tnllm_export.build.pipeline import BuildResult, build_engines

__all__ = ["BuildResult", "EngineOptions", "build_engines"]
