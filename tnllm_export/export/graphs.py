"""Both ONNX graphs of a model from its traced programs: build, repeat the layers, point to the weights."""

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from tnllm_export.bundle import WEIGHTS, WeightsLayout
from tnllm_export.export.template import MODEL, Template
from tnllm_export.graphs.passes.external_weights import ExternalWeight
from tnllm_export.graphs.pipeline import Program, build_graph
from tnllm_export.graphs.traced import TracedProgram
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.decay import slope_rates

_INPUTS = {"prefill": ("input_ids", "lengths", "positions"), "decode": ("input_ids", "positions")}


class GraphBuilder:
    """Makes the graphs "prefill" and "decode" of a model; no weight is read."""

    def __init__(self, config: TransnormerConfig, template: Template, *, lowering: str, layout: WeightsLayout) -> None:
        """Prepare.

        Args:
            config: The model.
            template: What was traced of it.
            lowering: Form of the two ops.
            layout: Where each weight will stand in the weights file.
        """
        self._config = config
        self._lowering = lowering
        self._template = template
        self._names = layout.names
        self._weights = {
            name: ExternalWeight(WEIGHTS, layout.offset(name), layout.nbytes(name)) for name in layout.names
        }

    def build(self, name: str, traced: TracedProgram) -> ir.Model:
        """Make the graph of that name. Raises ExportError if the program could not be translated."""
        layers = range(self._template.config.decoder_layers)
        inputs = [*_INPUTS[name], *(f"past_state.{layer}" for layer in layers)]
        outputs = ["logits", *(f"present_state.{layer}" for layer in layers)]
        names = {f"{MODEL}.{weight}": weight for weight in (*self._names, *_decay_rates(self._template.config))}
        if self._config.tie_word_embeddings:
            # The tracer calls the shared tensor by its last name; the file has it under the first.
            names[f"{MODEL}.lm_head.weight"] = "model.embed_tokens.weight"
        # The template's second layer stands for the first unlike layer 0, whose names need not be those of layer 1.
        names |= {weight: weight.removeprefix(f"{MODEL}.") for weight in traced.weights if weight not in names}
        rates = _decay_rates(self._config)
        program = Program(traced, inputs, outputs, MODEL, names, rates, self._template.kinds)
        return build_graph(program, self._lowering, self._weights)


def _decay_rates(config: TransnormerConfig) -> Mapping[str, Tensor]:
    """The decay rates, which are in no checkpoint, by the name of the module's buffer."""
    return {
        f"model.layers.{layer}.token_mixer.slope_rate": slope_rates(
            config.decay_type, layer, config.decoder_layers, config.decoder_attention_heads
        )
        for layer in range(config.decoder_layers)
    }
