"""`tnllm build-plugin`: our kernels become a TensorRT plugin library."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from tnllm_export.cli.options import JsonOption
from tnllm_export.cli.session import session

EPILOG = """[bold]Examples[/bold]

tnllm build-plugin --sm 8.6,8.9,12.0

tnllm build-plugin --sm 90 --bundle bundle -o libtnllm_plugins.so"""


def build_plugin(
    sm: Annotated[
        list[str] | None,
        typer.Option("--sm", metavar="8.6,12.0", help="Compute capabilities to compile for. Default: all there are."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Compile for this bundle's head sizes and dtype only.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to put it. Default: it stays in a cache."),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="TensorRT's headers. Default: TENSORRT_INCLUDE_DIR.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Compile the plugin library for the lowering plugin: with g++ and Triton, without a GPU.

    What was compiled before comes from a cache.
    """
    with session(json_output) as current:
        from tnllm_export import api

        started = time.monotonic()
        capabilities = tuple(part for text in sm or () for part in text.split(","))
        library = api.build_plugin(
            capabilities, bundle=bundle, output=output, include=include, progress=current.progress
        )
        seconds = time.monotonic() - started
        size = library.stat().st_size
        current.document = {"library": str(library), "bytes": size, "seconds": round(seconds, 3)}
        current.print(f"{library}: {decimal(size)} in {seconds:.1f} s")
