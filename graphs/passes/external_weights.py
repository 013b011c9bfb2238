"""Weights as external data: initializers point into a file that holds all of them once."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class ExternalWeight:
    """Where a weight lies: file beside the graph, offset and length in bytes."""

    location: str
    offset: int
    nbytes: int


class ExternalWeights(ir.passes.InPlacePass):
    """Give every initializer without a value its place in the weights file.

    Args:
        weights: Place of each weight, by name.
    """

    def __init__(self, weights: Mapping[str, ExternalWeight]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Attach external tensors; no file is opened."""
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                continue
            weight = self.weights[str(value.name)]
            assert value.dtype is not None
            assert isinstance(value.shape, ir.Shape)
            value.const_value = ir.ExternalTensor(
                location=weight.location,
                offset=weight.offset,
                length=weight.nbytes,
                dtype=value.dtype,
                shape=value.shape,
                name=str(value.name),
            )
            if value.const_value.nbytes != weight.nbytes:
                raise ir.passes.PassError(
                    f"{value.name}: {value.const_value.nbytes} bytes in the graph, {weight.nbytes} in the file"
                )
        return ir.passes.PassResult(model, True)
