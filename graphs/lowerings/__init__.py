"""The lowerings of our two ops: one module each, one entry point `lower(model)` each."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Lowering:
    """A way to express the two ops in ONNX.

    Attributes:
        module: Name of its module in this package, which is imported when it is used: names and opsets are asked for
            where no graph is made.
        opset: The ai.onnx opset that its graphs import.
    """

    module: str
    opset: int

    def lower(self, model: "ir.Model") -> None:
        """Replace the two ops, in place."""
        import_module(f"{__name__}.{self.module}").lower(model)


LOWERINGS: dict[str, Lowering] = {
    "contrib": Lowering("contrib", opset=20),
    "standard": Lowering("standard", opset=27),
    "matmul": Lowering("matmul", opset=20),
    "plugin": Lowering("plugin", opset=20),
    "hybrid": Lowering("hybrid", opset=20),
}
