"""Repeating the layers of a traced template gives the graph that tracing every layer gives."""

import onnx_ir as ir
import pytest
import torch

from tnllm_export.bundle import TensorSpec, open_bundle, plan_weights
from tnllm_export.export import export_bundle
from tnllm_export.export.graphs import GraphBuilder
from tnllm_export.export.template import Template
from tnllm_export.export.tracing import Tracing, trace_programs
from tnllm_export.models.checkpoint import expected_tensors
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import silent
from tnllm_export.runtime import TorchRuntime, load_runtime


def make_config(lrpe, **options):
    return TransnormerConfig(
        vocab_size=61,
        decoder_embed_dim=48,
        decoder_layers=len(lrpe),
        decoder_attention_heads=3,
        glu_dim=80,
        linear_use_lrpe_list=lrpe,
        init_std=0.2,
        **options,
    )


def description(model):
    """Everything a graph says, but for the names of constants."""

    def name(value):
        if value is None or value.const_value is None or isinstance(value.const_value, ir.ExternalTensor):
            return value and value.name
        return str(value.const_value.numpy().tolist())

    nodes = {
        node.name: (
            node.op_identifier(),
            [name(value) for value in node.inputs],
            [value.name for value in node.outputs],
            {key: str(attribute.value) for key, attribute in node.attributes.items()},
        )
        for node in model.graph
    }
    external = {
        value.name: (value.const_value.offset, value.const_value.length, str(value.dtype), str(value.shape))
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    ports = [[(value.name, str(value.shape)) for value in side] for side in (model.graph.inputs, model.graph.outputs)]
    return nodes, external, ports, dict(model.opset_imports), set(model.functions)


@pytest.mark.parametrize("lowering", ["plugin", "matmul", "hybrid"])
def test_the_released_form_unrolls_to_what_tracing_every_layer_gives(lowering):
    config = make_config([1, 0, 0, 0, 0])
    layout = plan_weights(TensorSpec(name, "float32", shape) for name, shape in expected_tensors(config).items())
    graphs = []
    for template in (Template.of(config), Template(config, tuple(range(config.decoder_layers)))):
        tracing = Tracing(template.config, torch.float32, "last")
        builder = GraphBuilder(config, template, lowering=lowering, layout=layout)
        programs = trace_programs(lambda tracing=tracing: tracing, silent)
        graphs.append({name: builder.build(name, program) for name, program in programs})
    unrolled, traced = graphs
    assert list(unrolled) == list(traced) == ["prefill", "decode"]
    for name, expected in traced.items():
        assert len(expected.graph) > 100
        assert description(unrolled[name]) == description(expected)


@pytest.mark.parametrize("lrpe", [[0, 1, 1, 0], [1, 1, 1], [0]], ids=str)
def test_any_order_of_layers_answers_as_the_eager_model(tmp_path, lrpe, write_checkpoint):
    assert_answers_as_eager(make_config(lrpe), tmp_path, write_checkpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": "rmsnorm", "linear_act_fun": "1+elu", "glu_act_fun": "silu"},
        {"norm_type": "layernorm", "linear_act_fun": "none", "glu_act_fun": "1+elu", "no_scale_embedding": True},
        {"linear_use_gate": False, "decay_type": "paper"},
    ],
    ids=str,
)
def test_any_option_of_the_model_answers_as_the_eager_model(tmp_path, options, write_checkpoint):
    assert_answers_as_eager(make_config([1, 0], **options), tmp_path, write_checkpoint)


@torch.inference_mode()
def assert_answers_as_eager(config, tmp_path, write_checkpoint):
    torch.manual_seed(0)
    model = TransnormerForCausalLM(config).eval()
    export_bundle(write_checkpoint(tmp_path / "checkpoint", model), tmp_path / "bundle")
    runtime, truth = load_runtime(open_bundle(tmp_path / "bundle")), TorchRuntime(model)
    ids, lengths = torch.randint(0, 61, (2, 70)), torch.tensor([70, 33], dtype=torch.int32)
    answers = [
        one.prefill(ids, lengths, torch.zeros(2, dtype=torch.int64), one.initial_state(2)) for one in (runtime, truth)
    ]
    (logits, state), (expected, expected_state) = answers
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5
    layers = zip(runtime.host_state(state), truth.host_state(expected_state), strict=True)
    assert max(((a - b).norm() / b.norm()).item() for a, b in layers) < 1e-5
