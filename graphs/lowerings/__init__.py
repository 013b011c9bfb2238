"""The lowerings of our two ops: one module each, one entry point `lower(model)` each."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from tnllm_export.graphs.lowerings import contrib, matmul, plugin, standard


@dataclass(frozen=True)
class Lowering:
    """A way to express the two ops in ONNX: its entry point and the ai.onnx opset that its graphs import."""

    lower: Callable[[ir.Model], None]
    opset: int


LOWERINGS: dict[str, Lowering] = {
    "contrib": Lowering(contrib.lower, opset=20),
    "standard": Lowering(standard.lower, opset=27),
    "matmul": Lowering(matmul.lower, opset=20),
    "plugin": Lowering(plugin.lower, opset=20),
}
