"""`tnllm inspect`: what is in a bundle, an ONNX file or a TensorRT engine."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from tnllm_export.cli.options import JsonOption
from tnllm_export.cli.session import session
from tnllm_export.cli.summary import count

if TYPE_CHECKING:
    from tnllm_export.inspection import EngineInfo, GraphInfo, Inspection, PortInfo

EPILOG = """[bold]Examples[/bold]

tnllm inspect bundle

tnllm inspect bundle/decode.onnx --json

tnllm inspect bundle/engines/tensorrt-rtx/*/decode.engine"""

_PORTS_SHOWN = 5


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle's folder, an .onnx file or an engine.")],
    json_output: JsonOption = False,
) -> None:
    """Show operators, opsets, inputs and outputs, parameters and sizes, and which targets can run it.

    Reads graphs and manifest only, never the weights.
    """
    with session(json_output) as current:
        from tnllm_export import api

        found = api.inspect(path)
        current.document = found.to_json()
        current.print(render(found))


def render(found: "Inspection") -> RenderableType:
    """Return everything as something rich prints."""
    parts: list[RenderableType] = [_facts(found)]
    for graph in found.graphs:
        parts += ["", _graph(graph), "", _ops(graph)]
    for engines in found.engines:
        parts += ["", _engines(engines)]
    return Group(*parts, "", _targets(found))


def _facts(found: "Inspection") -> Table:
    table = _grid()
    table.add_row("path", found.path)
    if found.bundle is not None:
        for name, value in _bundle_facts(found.bundle):
            table.add_row(name, value)
    if found.parameters:
        table.add_row("parameters", f"{count(found.parameters)} ({found.parameters:,})")
    table.add_row("dtype", found.dtype or "no floating-point weights")
    guessed = found.kind == "onnx"
    table.add_row("lowering", f"{found.lowering} (by its operators)" if guessed else found.lowering)
    table.add_row("size", decimal(found.bytes))
    return table


def _bundle_facts(bundle: dict[str, Any]) -> Iterable[tuple[str, str]]:
    config = bundle["config"]
    yield "checkpoint", bundle["source"]["checkpoint"]
    yield (
        "model",
        f"{config['decoder_layers']} layers, {config['decoder_attention_heads']} heads, width "
        f"{config['decoder_embed_dim']}, vocabulary {config['vocab_size']:,}",
    )
    yield "tokenizer", bundle["tokenizer"] or "none: takes token ids"
    yield "prompt logits", bundle["logits"]
    parity = bundle["parity"]
    yield "parity", "not verified yet" if parity is None else _parity(parity)
    yield "made by", ", ".join(f"{name} {version}" for name, version in bundle["tools"].items())


def _parity(parity: dict[str, Any]) -> str:
    verdict = "passed" if parity.get("passed") else "FAILED"
    return f"{verdict} on {parity.get('runtime', '?')}, {str(parity.get('created', '?'))[:10]}"


def _graph(graph: "GraphInfo") -> RenderableType:
    table = _grid()
    table.add_row("size", f"{decimal(graph.bytes)} and {decimal(graph.weight_bytes)} of weights")
    table.add_row("weights in", ", ".join(graph.external_files) or "the file itself")
    table.add_row("opsets", ", ".join(f"{domain} {version}" for domain, version in graph.opset_imports.items()))
    table.add_row("functions", ", ".join(graph.functions) or "none")
    table.add_row("inputs", _ports(graph.inputs))
    table.add_row("outputs", _ports(graph.outputs))
    return Group(Text(graph.file, "bold"), table)


def _engines(engines: "EngineInfo") -> RenderableType:
    table = _grid()
    profile = engines.profile
    table.add_row("built with", f"{engines.target} {engines.version}")
    table.add_row("runs on", engines.gpus)
    if profile is None:
        table.add_row("takes", "any batch, any prompt")
    else:
        table.add_row("takes", f"batch 1 … {profile['max_batch']}, prompt 1 … {profile['max_prompt']} tokens at once")
        table.add_row("fastest at", f"batch {profile['opt_batch']}, prompt {profile['opt_prompt']} tokens")
    table.add_row("weights", engines.weights)
    table.add_row("float32 products", "10 bits of precision (TF32)" if engines.tf32 else "at full precision")
    table.add_row("plugin library", "none needed" if engines.plugin is None else engines.plugin)
    table.add_row("files", ", ".join(f"{name} {decimal(size)}" for name, size in engines.files.items()))
    if engines.current is False:
        table.add_row("state", "built from other graphs or weights than the bundle has now: build again")
    return Group(Text(f"engines {engines.path}", "bold"), table)


def _ports(ports: "tuple[PortInfo, ...]") -> str:
    shown = list(ports) if len(ports) <= _PORTS_SHOWN + 1 else [*ports[: _PORTS_SHOWN - 1], ports[-1]]
    lines = [f"{port.name}  {port.dtype} [{', '.join(map(str, port.shape))}]" for port in shown]
    if len(shown) < len(ports):
        lines.insert(-1, f"… {len(ports) - len(shown)} more")
    return "\n".join(lines)


def _ops(graph: "GraphInfo") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("domain", header_style="dim")
    table.add_column("operators", header_style="dim")
    domains = dict.fromkeys(item.domain for item in graph.ops)
    for domain in domains:
        ops = ", ".join(f"{item.op} {item.count}" for item in graph.ops if item.domain == domain)
        table.add_row(domain, Text(ops))
    return table


def _targets(found: "Inspection") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("target", header_style="dim")
    table.add_column("runs it", header_style="dim")
    for verdict in found.targets:
        table.add_row(
            verdict.target, Text("yes", "green") if verdict.runs else Text("no: " + "; ".join(verdict.reasons))
        )
    return table


def _grid() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
