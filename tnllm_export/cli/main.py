"""The entry point `tnllm`."""

import atexit
import gc
import io
import sys
from typing import Annotated

import typer

from tnllm_export.cli import bench, build, build_plugin, demo, export, generate, inspect, train_demo, verify
from tnllm_export.cli.session import run_app
from tnllm_export.version import __version__

app = typer.Typer(
    name="tnllm",
    help="Export TransNormerLLM checkpoints to verified ONNX bundles, and run them.",
    epilog="Start with [bold]tnllm demo[/bold]. Each command has --help with examples, and --json.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    # Errors are told by cli.session in one line; nobody but a debugger wants a traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("export", epilog=export.EPILOG)(export.export)
app.command("verify", epilog=verify.EPILOG)(verify.verify)
app.command("generate", epilog=generate.EPILOG)(generate.generate)
app.command("build", epilog=build.EPILOG)(build.build)
app.command("build-plugin", epilog=build_plugin.EPILOG)(build_plugin.build_plugin)
app.command("bench", epilog=bench.EPILOG)(bench.bench)
app.command("inspect", epilog=inspect.EPILOG)(inspect.inspect)
app.command("train-demo", epilog=train_demo.EPILOG)(train_demo.train_demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tnllm-export {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run the command line."""
    # Imports make a million objects that stay; with Python's threshold of 700 the search takes a tenth of their time.
    gc.set_threshold(100_000)
    # Python looks for garbage once more before it ends, which after an export takes a second and gives nobody anything.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # Paths may hold bytes that are no text, and a terminal may lack characters: neither is worth a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    run_app(app)
