"""`tnllm export`: a checkpoint becomes a bundle."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from tnllm_export.cli.options import DtypeOption, JsonOption, Logits, LogitsOption, LoweringOption, OverwriteOption
from tnllm_export.cli.session import session

EPILOG = """[bold]Examples[/bold]

tnllm export TransNormerLLM-1B -o bundle

tnllm export TransNormerLLM-1B -o bundle --dtype float16 --lowering matmul --overwrite"""


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Hugging Face style folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="Folder to make.")],
    dtype: DtypeOption = None,
    lowering: LoweringOption = None,
    logits: LogitsOption = Logits.LAST,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Export a checkpoint as a bundle: two ONNX graphs, the weights once, tokenizer and manifest.

    The folder appears all at once: an export that fails or is killed leaves nothing half-done.
    """
    with session(json_output) as current:
        # Exporting multiplies no matrices, and only a process without threads can be forked to make the graphs.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from tnllm_export import api
        from tnllm_export.cli.summary import describe_bundle, summarize_bundle

        started = time.monotonic()
        bundle = api.export(
            checkpoint,
            output,
            dtype=dtype.value if dtype else None,
            lowering=lowering.value if lowering else None,
            logits=logits.value,
            overwrite=overwrite,
            progress=current.progress,
        )
        seconds = time.monotonic() - started
        current.document = {**summarize_bundle(bundle), "seconds": round(seconds, 3)}
        current.print(f"{describe_bundle(bundle)} in {seconds:.1f} s")
        current.note(f"next: tnllm verify {bundle.path}")
