"""The installed version."""

from importlib import metadata

__version__ = metadata.version("tnllm-export")
