"""`tnllm train-demo`: makes the demo checkpoint again."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

from pathlib import Path
from typing import Annotated

import typer

from tnllm_export.cli.options import JsonOption
from tnllm_export.cli.session import session

EPILOG = """[bold]Examples[/bold]

tnllm train-demo -o checkpoint

tnllm train-demo --corpus my-text.txt -o checkpoint --steps 500 --device cuda"""


def train_demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Checkpoint folder to make.")],
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Text to train on. Default: the novels where Debian installs them.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps. Default: the shipped checkpoint's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights and order. Default: the checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda … Default: CUDA where there is a device.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=0, help="Seconds after which training must end.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Train a demo checkpoint: tokenizer, small TransNormerLLM, model card with the measured perplexity."""
    with session(json_output) as current:
        from dataclasses import asdict

        from tnllm_export.demo import TrainingSettings, train

        given = {"steps": steps, "seed": seed, "time_limit_s": time_limit}
        settings = TrainingSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        result = train(corpus, output, settings=settings, device=device, progress=current.progress)
        validation = result.validation
        current.document = {
            "checkpoint": str(result.folder),
            "parameters": result.parameters,
            "best_step": result.best_step,
            "seconds": round(result.seconds, 1),
            "validation": asdict(validation),
        }
        current.print(
            f"{result.folder}: {result.parameters:,} parameters, validation perplexity {validation.perplexity:.1f} per "
            f"token, {validation.word_perplexity:.1f} per word, in {result.seconds:.0f} s"
        )
        current.note(f"next: tnllm export {result.folder} -o bundle")
