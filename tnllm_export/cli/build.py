"""`tnllm build`: a bundle becomes TensorRT engines or AOTInductor packages."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from tnllm_export.cli.options import BundleArgument, JsonOption
from tnllm_export.cli.session import session

if TYPE_CHECKING:
    from tnllm_export.build import BuildResult

EPILOG = """[bold]Examples[/bold]

tnllm build bundle --target tensorrt-rtx --max-batch 8 --max-prompt 512

tnllm build bundle --sm 8.6,12.0 --weights external

tnllm build bundle --plugin-library libtnllm_plugins.so --embed-plugin

tnllm build bundle --target aotinductor --device cpu"""


class EngineTargetName(StrEnum):
    """What engines are built with."""

    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"
    AOTINDUCTOR = "aotinductor"


class BuildDevice(StrEnum):
    """What a package runs on."""

    CPU = "cpu"
    CUDA = "cuda"


class Weights(StrEnum):
    """Where the weights of an engine are."""

    EMBEDDED = "embedded"
    EXTERNAL = "external"
    STRIPPED = "stripped"


def build(
    bundle: BundleArgument,
    target: Annotated[
        EngineTargetName, typer.Option(help="What builds and runs the engines; tensorrt-rtx builds without a GPU.")
    ] = EngineTargetName.TENSORRT_RTX,
    device: Annotated[
        BuildDevice | None,
        typer.Option(help="What packages run on; aotinductor only. Default: cuda where there is one."),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most sequences at once.")] = 8,
    max_prompt: Annotated[int, typer.Option(help="Most tokens of one prefill; longer prompts go in pieces.")] = 512,
    opt_batch: Annotated[int, typer.Option(help="Batch that is made fastest.")] = 1,
    opt_prompt: Annotated[
        int | None, typer.Option(help="Tokens of a prefill that is made fastest. Default: --max-prompt.")
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(help="In each engine; outside, one copy for both; or stripped by TensorRT, refitted when loaded."),
    ] = Weights.EMBEDDED,
    sm: Annotated[
        list[str] | None,
        typer.Option("--sm", metavar="8.6,12.0", help="Compute capabilities to build for. Default: the target's own."),
    ] = None,
    plugin_library: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Library that `tnllm build-plugin` made, for the lowering plugin."),
    ] = None,
    embed_plugin: Annotated[bool, typer.Option("--embed-plugin", help="Put the library into the engines.")] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let float32 products use the tensor cores, at 10 bits of precision.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep measured times between builds; tensorrt only.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even if the bundle has these engines.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Build a bundle's prefill and decode engines, into its folder `engines`.

    They are built again only when something that shapes them has changed: graphs, weights, an option, TensorRT. The
    target aotinductor compiles packages instead, for any batch and prompt; of the options it takes --device.
    """
    with session(json_output) as current:
        from tnllm_export import api

        options = api.EngineOptions(
            max_batch=max_batch,
            max_prompt=max_prompt,
            opt_batch=opt_batch,
            opt_prompt=opt_prompt,
            weights=weights.value,
            compute_capabilities=tuple(part for text in sm or () for part in text.split(",")),
            plugin_library=plugin_library,
            embed_plugin=embed_plugin,
            tf32=tf32,
            timing_cache=timing_cache,
            device=device.value if device else None,
        )
        started = time.monotonic()
        result = api.build(bundle, target.value, options, rebuild=rebuild, progress=current.progress)
        seconds = time.monotonic() - started
        current.document = {**summarize(result), "seconds": round(seconds, 3)}
        sizes = ", ".join(f"{name} {decimal(record.bytes)}" for name, record in result.engines.record.files.items())
        how = "there already" if result.cached else f"built in {seconds:.1f} s"
        current.print(f"{result.engines.path}: {sizes}; {how}")


def summarize(result: "BuildResult") -> dict[str, Any]:
    """Return what was built, in JSON's types."""
    return {
        "engines": str(result.engines.path),
        "key": result.engines.spec.key,
        "cached": result.cached,
        **result.engines.record.model_dump(mode="json", include={"spec", "files"}),
    }
