"""Exporting a checkpoint: trace, stream the weights meanwhile, build graphs, commit the bundle."""
# ruff: noqa: PLC0415 - what builds graphs is imported while their programs are traced

import contextlib
import gc
import importlib.metadata
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from tnllm_export.bundle import (
    DTYPES,
    Bundle,
    BundleWriter,
    Graphs,
    Manifest,
    Source,
    TensorSpec,
    WeightsLayout,
    plan_weights,
)
from tnllm_export.errors import ExportError
from tnllm_export.export.forked import Forked
from tnllm_export.export.template import Template
from tnllm_export.export.tracing import Tracing, trace_programs
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
        lowering: "contrib", "standard", "matmul", "plugin" or "hybrid". Default: what ONNX Runtime on the CPU prefers.
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
    writer = BundleWriter(output, overwrite)
    # Forked before there are threads, and before there is a lock on the new folder that would outlive this process.
    with _without_pauses(), Forked(trace_programs) as tracing:
        opened = open_checkpoint(checkpoint)
        if opened.tokenizer_path is not None:
            load_tokenizer(opened.tokenizer_path, opened.config.vocab_size)  # a broken one is found now, not later
        chosen = dtype or _default_dtype(opened, DEFAULT_TARGET)
        form = lowering or DEFAULT_TARGET.lowerings[0]
        template = Template.of(opened.config)
        layout = _plan(opened, DTYPES[chosen])
        with writer:
            with _writing_weights(writer, layout, opened, progress) as watched:
                programs = tracing.answers(Tracing(template.config, DTYPES[chosen], logits), watched)
                from tnllm_export.export.finished import finish_graph, write_graph
                from tnllm_export.export.graphs import GraphBuilder

                builder = GraphBuilder(opened.config, template, lowering=form, layout=layout)
                graphs = {}
                for name, program in programs:
                    graphs[name] = finish_graph(name, builder.build(name, program))
                    watched("making graphs", len(graphs), 2, "graphs")
            for name, graph in graphs.items():
                write_graph(writer, name, graph)
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
                    graphs=Graphs(**{name: graph.record for name, graph in graphs.items()}),
                    tokenizer=opened.tokenizer_path.name if opened.tokenizer_path else None,
                    tools={name: importlib.metadata.version(name) for name in _TOOLS},
                    source=Source(checkpoint=checkpoint.resolve().name, parameters=opened.parameters),
                )
            )


@contextlib.contextmanager
def _without_pauses() -> Iterator[None]:
    """Don't look for garbage: making graphs makes millions of objects, and a fifth of it would be the search."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            # Among the oldest objects, which are searched last: else all that is new would be searched at once, now.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


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
