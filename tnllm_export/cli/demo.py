"""`tnllm demo`: the whole way with the checkpoint that the package ships."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

import time
from pathlib import Path
from typing import Annotated

import typer

from tnllm_export.cli.options import JsonOption, OverwriteOption
from tnllm_export.cli.session import session

EPILOG = """[bold]Examples[/bold]

tnllm demo

tnllm demo -o my-demo --prompt "Elizabeth had never in her life" """

DEFAULT_FOLDER = Path("tnllm-demo")
PROMPT = "It was a fine morning in May, and"


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Bundle to make. Default: tnllm-demo.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    seed: Annotated[int, typer.Option(min=0, help="Of the text.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the text.")] = 120,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Export the demo checkpoint, verify the bundle against PyTorch, and stream a continuation.

    The default folder is replaced when it is there, another one only with --overwrite.
    """
    with session(json_output) as current:
        from tnllm_export import api
        from tnllm_export.cli.generate import Printer, to_json
        from tnllm_export.cli.summary import describe_bundle, summarize_bundle
        from tnllm_export.demo import checkpoint_folder
        from tnllm_export.verify.report import headline

        started = time.monotonic()
        bundle = api.export(
            checkpoint_folder(),
            output or DEFAULT_FOLDER,
            overwrite=overwrite or output is None,
            progress=current.progress,
        )
        current.print(f"exported  {describe_bundle(bundle)} in {time.monotonic() - started:.1f} s")
        report = api.verify(bundle, progress=current.progress)
        current.document = {"bundle": summarize_bundle(bundle), "parity": report.summary()}
        current.print(headline(report))
        report.require_pass()

        bundle = api.open_bundle(bundle.path)
        params = api.SamplingParams(temperature=0.7, top_p=0.9, seed=seed, max_new_tokens=max_new_tokens)
        generator = api.generator(bundle, progress=current.progress)
        current.print("")
        [generation] = Printer(current, [prompt], as_text=True, echo=True).follow(generator.stream(prompt, params))
        page = bundle.path / "reports" / "parity.html"
        current.document |= {"report": str(page), "generation": to_json(generation)}
        current.print(
            f"\nbundle    {bundle.path}\nreport    {page}\n"
            f"speed     {generation.tokens_per_second:.0f} tokens/s\n"
            f'more      tnllm generate {bundle.path} --prompt "…"'
        )
