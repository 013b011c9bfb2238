"""onnx-ir passes, one per file."""
