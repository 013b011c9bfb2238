"""Exporting a checkpoint: trace, build graphs, stream the weights meanwhile, commit the bundle."""

import contextlib
import importlib.metadata
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from tnllm_export.bundle import (
    DTYPES,
    Bundle,
    BundleWriter,
    GraphRecord,
    Graphs,
    Manifest,
    Port,
    Source,
    TensorSpec,
    WeightsLayout,
    plan_weights,
)
from tnllm_export.errors import ExportError
from tnllm_export.export.graphs import export_graphs
from tnllm_export.graphs.lowerings import LOWERINGS
from tnllm_export.models.checkpoint import Checkpoint, open_checkpoint
from tnllm_export.models.modeling import Logits, parameter_dtype
from tnllm_export.models.tokenizer import load_tokenizer
from tnllm_export.progress import Progress, silent
from tnllm_export.targets import TARGETS, Target

Dtype = Literal["float32", "float16", "bfloat16"]
DEFAULT_TARGET = next(target for target in TARGETS if target.name == "onnxruntime-cpu")

_TOOLS = ("tnllm-export", "torch", "onnx", "onnx-ir", "onnxscript")


def export_bundle(
    checkpoint: Path,
    output: Path,
    *,
    dtype: Dtype | None = None,
    lowering: str | None = None,
    logits: Logits = "last",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Export a checkpoint folder as a bundle. Weights are streamed: memory does not grow with the model.

    Args:
        checkpoint: Hugging Face style folder.
        output: Where the bundle shall be; it appears there all at once.
        dtype: Of weights and activations. Default: the checkpoint's own, if ONNX Runtime on the CPU runs it, else
            float32.
        lowering: "contrib", "standard", "matmul" or "plugin". Default: what ONNX Runtime on the CPU prefers.
        logits: Whether prefill gives the logits of the "last" valid token or of "all".
        overwrite: Whether a bundle at `output` may be replaced.
        progress: Told what is being done.

    Raises:
        CheckpointError: The checkpoint can't be used.
        BundleExistsError: Something is at `output`.
        ExportError: An option is unknown, or a graph could not be made.
        WriteError: Disk full, no permission.
    """
    _check_options(dtype, lowering, logits)
    with BundleWriter(output, overwrite) as writer:
        opened = open_checkpoint(checkpoint)
        if opened.tokenizer_path is not None:
            load_tokenizer(opened.tokenizer_path, opened.config.vocab_size)  # a broken one is found now, not later
        chosen = dtype or _default_dtype(opened, DEFAULT_TARGET)
        form = lowering or DEFAULT_TARGET.lowerings[0]
        layout = _plan(opened, DTYPES[chosen])
        with _writing_weights(writer, layout, opened, progress) as watched:
            graphs = export_graphs(
                opened.config, dtype=chosen, lowering=form, logits=logits, layout=layout, progress=watched
            )
        for name, graph in graphs.items():
            _write_graph(writer, name, graph)
        if opened.tokenizer_path is not None:
            writer.copy_file(opened.tokenizer_path, opened.tokenizer_path.name)
        return writer.commit(
            Manifest(
                config=opened.config,
                dtype=chosen,
                lowering=form,
                logits=logits,
                opset_imports={
                    domain: version for graph in graphs.values() for domain, version in graph.opset_imports.items()
                },
                graphs=Graphs(prefill=_record("prefill", graphs), decode=_record("decode", graphs)),
                tokenizer=opened.tokenizer_path.name if opened.tokenizer_path else None,
                tools={name: importlib.metadata.version(name) for name in _TOOLS},
                source=Source(checkpoint=checkpoint.resolve().name, parameters=opened.parameters),
            )
        )


@contextlib.contextmanager
def _writing_weights(
    writer: BundleWriter, layout: WeightsLayout, checkpoint: Checkpoint, progress: Progress
) -> Iterator[Progress]:
    """Write the weights while the body makes the graphs: one waits for the disk, the other for the interpreter.

    Yields a progress for the body that raises what has gone wrong with the weights meanwhile.
    """
    stop = threading.Event()

    def weights() -> Iterator[tuple[str, Tensor]]:
        for item in checkpoint.stream(layout.names):
            if stop.is_set():
                return
            yield item

    with ThreadPoolExecutor(max_workers=1) as pool:
        written = pool.submit(writer.write_weights, layout, weights(), progress)

        def watched(stage: str, done: int, total: int, unit: str = "") -> None:
            if written.done():
                written.result()
            progress(stage, done, total, unit)

        try:
            yield watched
        except BaseException:
            stop.set()  # what the writer then says of missing tensors is of no interest
            raise
        written.result()


def _check_options(dtype: str | None, lowering: str | None, logits: str) -> None:
    for name, value, allowed in (
        ("dtype", dtype, get_args(Dtype)),
        ("lowering", lowering, tuple(LOWERINGS)),
        ("logits", logits, get_args(Logits)),
    ):
        if value is not None and value not in allowed:
            raise ExportError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _default_dtype(checkpoint: Checkpoint, target: Target) -> Dtype:
    """The embedding's dtype, where the target runs it."""
    stored = checkpoint.tensors["model.embed_tokens.weight"].dtype
    for name in get_args(Dtype):
        if DTYPES[name] == stored and name in target.dtypes:
            own: Dtype = name
            return own
    return "float32"


def _plan(checkpoint: Checkpoint, dtype: torch.dtype) -> WeightsLayout:
    return plan_weights(
        TensorSpec(name, str(parameter_dtype(name, dtype)).removeprefix("torch."), info.shape)
        for name, info in checkpoint.tensors.items()
    )


def _write_graph(writer: BundleWriter, name: str, graph: ir.Model) -> None:
    """Write and check a graph; the checker wants to see the weights file beside it."""
    file = f"{name}.onnx"
    writer.write_bytes(file, ir.to_proto(graph).SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(writer.folder / file))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the {name} graph is not valid ONNX: {str(error).splitlines()[0]}") from error


def _record(name: str, graphs: Mapping[str, ir.Model]) -> GraphRecord:
    graph = graphs[name].graph
    return GraphRecord(
        file=f"{name}.onnx",
        inputs=tuple(_port(value) for value in graph.inputs),
        outputs=tuple(_port(value) for value in graph.outputs),
    )


def _port(value: ir.Value) -> Port:
    assert value.dtype is not None
    assert value.shape is not None
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return Port(name=str(value.name), dtype=value.dtype.numpy().name, shape=dims)
