"""Both ONNX graphs of a model: trace one layer of each kind, build, repeat the layers, point to the weights, write."""

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor
from torch.export import ExportedProgram

from tnllm_export.bundle import DTYPES, WEIGHTS, GraphRecord, Port, WeightsLayout
from tnllm_export.export.finished import FinishedGraph
from tnllm_export.export.forked import Forked
from tnllm_export.export.programs import MODEL, Tracer
from tnllm_export.graphs.passes.external_weights import ExternalWeight
from tnllm_export.graphs.pipeline import Program, build_graph
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.decay import slope_rates
from tnllm_export.models.modeling import Logits
from tnllm_export.progress import Progress


class GraphExporter:
    """Makes the graphs "prefill" and "decode" of a model; no weight is read."""

    def __init__(
        self,
        config: TransnormerConfig,
        *,
        dtype: str,
        lowering: str,
        logits: Logits,
        layout: WeightsLayout,
        unroll: bool = True,
    ) -> None:
        """Prepare.

        Args:
            config: The model.
            dtype: Of weights and activations.
            lowering: Form of the two ops.
            logits: Which logits prefill gives.
            layout: Where each weight will stand in the weights file.
            unroll: Trace one layer of each kind and repeat it. Without, every layer is traced: the same graph, later.
        """
        self._config = config
        self._lowering = lowering
        self._logits: Logits = logits
        self._kinds = _layer_kinds(config) if unroll else tuple(range(config.decoder_layers))
        self._template = _template(config, self._kinds)
        self._tracer = Tracer(self._template, DTYPES[dtype])
        self._names = layout.names
        self._weights = {
            name: ExternalWeight(WEIGHTS, layout.offset(name), layout.nbytes(name)) for name in layout.names
        }

    def prefill(self) -> ir.Model:
        """Make the graph. Raises ExportError if the program could not be traced or translated."""
        return self._graph(self._tracer.prefill(self._logits), ("input_ids", "lengths", "positions"))

    def decode(self) -> ir.Model:
        """Make the graph. Raises ExportError if the program could not be traced or translated."""
        return self._graph(self._tracer.decode(), ("input_ids", "positions"))

    def finish(self, progress: Progress) -> dict[str, FinishedGraph]:
        """Make both graphs, side by side where this process can be forked.

        Raises:
            ExportError: A program could not be traced or translated.
        """
        progress("making graphs", 0, 2, "graphs")
        with Forked(lambda _: _finish("decode", self.decode())) as decode:
            prefill = _finish("prefill", self.prefill())
            progress("making graphs", 1, 2, "graphs")
            graphs = {"prefill": prefill, "decode": decode.result(progress)}
        progress("making graphs", 2, 2, "graphs")
        return graphs

    def _graph(self, exported: ExportedProgram, inputs: tuple[str, ...]) -> ir.Model:
        past = [f"past_state.{layer}" for layer in range(self._template.decoder_layers)]
        outputs = ["logits", *(f"present_state.{layer}" for layer in range(self._template.decoder_layers))]
        names = {f"{MODEL}.{name}": name for name in (*self._names, *_decay_rates(self._template))}
        if self._config.tie_word_embeddings:
            # The tracer calls the shared tensor by its last name; the file has it under the first.
            names[f"{MODEL}.lm_head.weight"] = "model.embed_tokens.weight"
        # The template's second layer stands for the first unlike layer 0, whose names need not be those of layer 1.
        names |= {name: name.removeprefix(f"{MODEL}.") for name in exported.state_dict if name not in names}
        rates = _decay_rates(self._config)
        program = Program(exported, [*inputs, *past], outputs, MODEL, names, rates, self._kinds)
        return build_graph(program, self._lowering, self._weights)


def _finish(name: str, model: ir.Model) -> FinishedGraph:
    record = GraphRecord(
        file=f"{name}.onnx",
        inputs=tuple(_port(value) for value in model.graph.inputs),
        outputs=tuple(_port(value) for value in model.graph.outputs),
    )
    proto = ir.to_proto(model).SerializeToString(deterministic=True)
    return FinishedGraph(proto, record, dict(model.opset_imports))


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
