"""Both ONNX graphs of a model: trace one layer of each kind, build, repeat the layers, point to the weights, write."""

from collections.abc import Mapping

import onnx
import onnx_ir as ir
from torch import Tensor

from tnllm_export.bundle import DTYPES, WEIGHTS, BundleWriter, GraphRecord, Port, WeightsLayout
from tnllm_export.errors import ExportError
from tnllm_export.export.programs import MODEL, trace_programs
from tnllm_export.graphs.passes.external_weights import ExternalWeight
from tnllm_export.graphs.pipeline import Program, build_graph
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.decay import slope_rates
from tnllm_export.models.modeling import Logits
from tnllm_export.progress import Progress, silent


def export_graphs(
    config: TransnormerConfig,
    *,
    dtype: str,
    lowering: str,
    logits: Logits,
    layout: WeightsLayout,
    unroll: bool = True,
    progress: Progress = silent,
) -> dict[str, ir.Model]:
    """Make the graphs "prefill" and "decode"; no weight is read.

    Args:
        config: The model.
        dtype: Of weights and activations.
        lowering: Form of the two ops.
        logits: Which logits prefill gives.
        layout: Where each weight will stand in the weights file.
        unroll: Trace one layer of each kind and repeat it. Without, every layer is traced: the same graph, later.
        progress: Told of each program and graph.

    Raises:
        ExportError: A program could not be traced or translated.
    """
    kinds = _layer_kinds(config) if unroll else tuple(range(config.decoder_layers))
    template = _template(config, kinds)
    progress("tracing programs", 0, 1)
    traced = trace_programs(template, DTYPES[dtype], logits)
    progress("tracing programs", 1, 1)

    past = [f"past_state.{layer}" for layer in range(template.decoder_layers)]
    outputs = ["logits", *(f"present_state.{layer}" for layer in range(template.decoder_layers))]
    names = {f"{MODEL}.{name}": name for name in (*layout.names, *_decay_rates(template))}
    if config.tie_word_embeddings:
        # The tracer calls the shared tensor by its last name; the file has it under the first.
        names[f"{MODEL}.lm_head.weight"] = "model.embed_tokens.weight"
    # The template's second layer stands for the first unlike layer 0, whose names need not be those of layer 1.
    names |= {name: name.removeprefix(f"{MODEL}.") for name in traced.prefill.state_dict if name not in names}
    weights = {name: ExternalWeight(WEIGHTS, layout.offset(name), layout.nbytes(name)) for name in layout.names}
    programs = {
        "prefill": (traced.prefill, ["input_ids", "lengths", "positions", *past]),
        "decode": (traced.decode, ["input_ids", "positions", *past]),
    }
    graphs = {}
    for done, (name, (exported, inputs)) in enumerate(programs.items()):
        progress("building graphs", done, len(programs), "graphs")
        program = Program(exported, inputs, outputs, MODEL, names, _decay_rates(config), kinds)
        graphs[name] = build_graph(program, lowering, weights)
    progress("building graphs", len(programs), len(programs), "graphs")
    return graphs


def write_graph(writer: BundleWriter, name: str, graph: ir.Model) -> None:
    """Write a graph into a bundle and check it; the checker wants to see the weights file beside it.

    Raises:
        ExportError: It is not valid ONNX.
        WriteError: Disk full, or no permission.
    """
    file = f"{name}.onnx"
    writer.write_bytes(file, ir.to_proto(graph).SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(writer.folder / file))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the {name} graph is not valid ONNX: {str(error).splitlines()[0]}") from error


def describe_graph(name: str, model: ir.Model) -> GraphRecord:
    """Return what the manifest says of a graph."""
    return GraphRecord(
        file=f"{name}.onnx",
        inputs=tuple(_port(value) for value in model.graph.inputs),
        outputs=tuple(_port(value) for value in model.graph.outputs),
    )


def _layer_kinds(config: TransnormerConfig) -> tuple[int, ...]:
    """Number the kinds of layers in order of appearance: the first, and the others with and without LRPE.

    The first layer is a kind of its own because it computes what all share, a mask of the padding say.
    """
    others = config.linear_use_lrpe_list[1:]
    kinds = {flag: kind for kind, flag in enumerate(dict.fromkeys(others), start=1)}
    return (0, *(kinds[flag] for flag in others))


def _template(config: TransnormerConfig, kinds: tuple[int, ...]) -> TransnormerConfig:
    """Return the configuration of a model with the first layer of each kind."""
    flags = tuple(config.linear_use_lrpe_list[kinds.index(kind)] for kind in range(max(kinds) + 1))
    return config.model_copy(update={"decoder_layers": len(flags), "linear_use_lrpe_list": flags})


def _decay_rates(config: TransnormerConfig) -> Mapping[str, Tensor]:
    """The decay rates, which are in no checkpoint, by the name of the module's buffer."""
    return {
        f"model.layers.{layer}.token_mixer.slope_rate": slope_rates(
            config.decay_type, layer, config.decoder_layers, config.decoder_attention_heads
        )
        for layer in range(config.decoder_layers)
    }


def _port(value: ir.Value) -> Port:
    assert value.dtype is not None
    assert value.shape is not None
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return Port(name=str(value.name), dtype=value.dtype.numpy().name, shape=dims)
