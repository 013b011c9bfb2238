"""From an ExportedProgram to an onnx-ir model in which each of our two ops is one node of the domain `tnllm`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from torch.export import ExportedProgram

from tnllm_export.errors import ExportError
from tnllm_export.graphs.passes.optimize import quiet_loggers
from tnllm_export.graphs.schemas import register_schemas
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE, OPSET_VERSION

OPSET = 20
"""ai.onnx opset of translated graphs: the newest that every runtime we target has had for years."""

_TNLLM = onnxscript.values.Opset(NAMESPACE, OPSET_VERSION)


def _chunk(query: Any, key: Any, value: Any, slope_rate: Any, past_state: Any, lengths: Any) -> Any:
    return _TNLLM.LightningAttention(query, key, value, slope_rate, past_state, lengths, _outputs=2)


def _step(query: Any, key: Any, value: Any, slope_rate: Any, past_state: Any) -> Any:
    return _TNLLM.LightningAttentionStep(query, key, value, slope_rate, past_state, _outputs=2)


def translate(
    program: ExportedProgram,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    weight_names: Mapping[str, str],
) -> ir.Model:
    """Translate a program; no weight is read, so the weights may be fake tensors.

    Args:
        program: What torch.export made.
        input_names: Names of the graph's inputs, in the program's order.
        output_names: Names of the graph's outputs, in the program's order.
        weight_names: The program's parameter and buffer names, and the name of each as an initializer.

    Returns:
        A model of opset 20 whose initializers have names, dtypes and shapes but no values.

    Raises:
        ExportError: An operator has no translation.
    """
    register_schemas()
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        getattr(getattr(torch.ops, NAMESPACE), LIGHTNING_ATTENTION.torch_name).default: _chunk,
        getattr(getattr(torch.ops, NAMESPACE), LIGHTNING_ATTENTION_STEP.torch_name).default: _step,
    }
    with quiet_loggers("torch.onnx", "onnx_ir", "onnxscript"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                custom_translation_table=table,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"the program could not be translated to ONNX: {error}".splitlines()[0]) from error
    if exported is None:
        raise ExportError("the program could not be translated to ONNX: the exporter returned nothing")
    model: ir.Model = exported.model
    _rename(model.graph.inputs, input_names)
    _rename(model.graph.outputs, output_names)
    for value in list(model.graph.initializers.values()):
        if str(value.name) in weight_names:
            value.const_value = None
            value.name = weight_names[str(value.name)]
    return model


def _rename(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name
