"""Graphs as they are written: what comes back from where they were made, which may be another process."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from tnllm_export.bundle import BundleWriter, GraphRecord
from tnllm_export.errors import ExportError


@dataclass(frozen=True)
class FinishedGraph:
    """A graph's file, what the manifest says of it, and the opsets that it imports."""

    proto: bytes
    record: GraphRecord
    opset_imports: Mapping[str, int]


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
