"""`tnllm bench`: how fast a bundle is, and how fast it could be."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

from pathlib import Path
from typing import Annotated

import typer

from tnllm_export.cli.options import BundleArgument, DeviceName, JsonOption, RuntimeName, ThreadsOption
from tnllm_export.cli.session import session

EPILOG = """[bold]Examples[/bold]

tnllm bench bundle

tnllm bench bundle --runtime torch --runtime onnxruntime --device cuda -o bench.html

tnllm bench bundle --prompt-lengths 512,8192 --contexts 1024,131072 --batches 1,8,32 --json"""


def bench(
    bundle: BundleArgument,
    runtime: Annotated[
        list[RuntimeName] | None,
        typer.Option("--runtime", help="What to time; may be repeated. Default: all that run on the device."),
    ] = None,
    device: Annotated[
        DeviceName | None, typer.Option("--device", help="Default: cuda where PyTorch finds one.")
    ] = None,
    prompt_lengths: Annotated[str, typer.Option(metavar="1,2,3", help="Prompts, in tokens.")] = "128,512,2048",
    contexts: Annotated[
        str, typer.Option(metavar="1,2,3", help="Tokens before the decoded ones.")
    ] = "128,1024,8192,131072",
    batches: Annotated[str, typer.Option(metavar="1,2,3", help="Sequences decoded together.")] = "1,8",
    tokens: Annotated[int, typer.Option(help="Tokens decoded in each case.")] = 64,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Of timing; runtimes share it.")] = 300.0,
    threads: ThreadsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write the report as an HTML page, new or in place of an earlier report.",
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Time a bundle on one or several runtimes, beside the roofline of the device.

    Time to the first token, decode latency and peak memory, each beside what
    bytes and FLOPs take at the rates of a copy and a matrix product in the
    same run. Each runtime is verified first. Exit code 60: one differs from
    the eager model; 40: none could be timed.
    """
    with session(json_output) as current:
        from tnllm_export import api
        from tnllm_export.bench.report import terminal_report

        report = api.bench(
            bundle,
            [name.value for name in runtime or []],
            device=None if device is None else device.value,
            prompt_lengths=parse_numbers("--prompt-lengths", prompt_lengths),
            contexts=parse_numbers("--contexts", contexts),
            batches=parse_numbers("--batches", batches),
            tokens=tokens,
            time_limit=time_limit,
            threads=threads,
            output=output,
            progress=current.progress,
        )
        current.document = report.to_json()
        current.print(terminal_report(report))
        if output is not None:
            current.print("")
            current.print(f"report: {output}")
        report.require_results()


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Read `1,2,3`. Raises RequestError."""
    from tnllm_export.errors import RequestError

    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise RequestError(f"{option} is {text!r}; expected integers, as in 1,2,3") from None
