"""`tnllm verify`: a bundle against the eager model."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

from pathlib import Path
from typing import Annotated

import typer

from tnllm_export.cli.options import (
    BundleArgument,
    DeviceOption,
    JsonOption,
    RuntimeName,
    RuntimeOption,
    ThreadsOption,
)
from tnllm_export.cli.session import session

EPILOG = """[bold]Examples[/bold]

tnllm verify bundle

tnllm verify bundle --checkpoint TransNormerLLM-1B --text-file chapter.txt --seed 7"""


def verify(
    bundle: BundleArgument,
    runtime: RuntimeOption = RuntimeName.ONNXRUNTIME,
    device: DeviceOption = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", metavar="FOLDER", help="Take the eager model's weights from here. Default: from the bundle."
        ),
    ] = None,
    text_file: Annotated[
        Path | None,
        typer.Option("--text-file", metavar="FILE", help="UTF-8 text to verify on. Default: a sample text."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the random tokens. Default: a new one.")
    ] = None,
    threads: ThreadsOption = None,
    save: Annotated[bool, typer.Option(help="Write the report into the bundle.")] = True,
    json_output: JsonOption = False,
) -> None:
    """Compare a bundle with the eager PyTorch model: logits, states, greedy texts.

    Runs both on fresh random tokens and on real text, prints the measured errors beside their limits, and writes
    reports/parity.html and reports/parity.json into the bundle. Exits with 60 where they differ.
    """
    with session(json_output) as current:
        from tnllm_export import api
        from tnllm_export.verify import check_savable, save_report
        from tnllm_export.verify.report import terminal_report

        opened = api.open_bundle(bundle, progress=current.progress)
        if save:
            check_savable(opened)
        report = api.verify(
            opened,
            runtime.value,
            device=None if device is None else device.value,
            checkpoint=checkpoint,
            text=None if text_file is None else read_text(text_file),
            seed=seed,
            threads=threads,
            save=False,  # below: what was measured is shown even where the disk is full
            progress=current.progress,
        )
        current.document = report.to_json()
        current.print(terminal_report(report))
        if save:
            save_report(opened, report)
            current.print("")
            current.print(f"report: {bundle / 'reports' / 'parity.html'}")
        report.require_pass()


def read_text(path: Path) -> str:
    """Read a text file. Raises PromptError where it is no UTF-8."""
    from tnllm_export.errors import PromptError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
