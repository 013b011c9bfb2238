"""Graphs as they are written, and what the manifest says of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from tnllm_export.bundle import BundleWriter, GraphRecord, Port
from tnllm_export.errors import ExportError


@dataclass(frozen=True)
class FinishedGraph:
    """A graph's file, what the manifest says of it, and the opsets that it imports."""

    proto: bytes
    record: GraphRecord
    opset_imports: Mapping[str, int]


def finish_graph(name: str, model: ir.Model) -> FinishedGraph:
    """Serialise a graph for the file NAME.onnx."""
    record = GraphRecord(
        file=f"{name}.onnx",
        inputs=tuple(_port(value) for value in model.graph.inputs),
        outputs=tuple(_port(value) for value in model.graph.outputs),
    )
    proto = ir.to_proto(model).SerializeToString(deterministic=True)
    return FinishedGraph(proto, record, dict(model.opset_imports))


def write_graph(writer: BundleWriter, name: str, graph: FinishedGraph) -> None:
    """Write a graph into a bundle and check it; the checker wants to see the weights file beside it.

    Raises:
        ExportError: It is not valid ONNX.
        WriteError: Disk full, or no permission.
    """
    writer.write_bytes(graph.record.file, graph.proto)
    try:
        onnx.checker.check_model(str(writer.folder / graph.record.file))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the {name} graph is not valid ONNX: {str(error).splitlines()[0]}") from error


def _port(value: ir.Value) -> Port:
    assert value.dtype is not None
    assert value.shape is not None
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return Port(name=str(value.name), dtype=value.dtype.numpy().name, shape=dims)
