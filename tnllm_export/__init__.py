"""Export TransNormerLLM checkpoints to verified ONNX bundles, and run them.

The public functions and types are in `tnllm_export.api`: `load`, `export`, `verify`, `load_runtime`, `generate`. They
are not repeated here, since `export`, `verify` and `generate` are also the names of this package's floors.
Importing this package imports nothing else.
"""

from tnllm_export.version import __version__

__all__ = ["__version__"]
