"""Programs for CUDA: the ops that a package can hold stand where ours stood. Tracing them needs no GPU."""

import pytest
import torch
from torch._inductor.utils import tensor_is_aligned

from tests.tnllm_export.build.conftest import MODELS
from tnllm_export.build.aotinductor_programs import ProgramTracer, _DecodeInPlace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    from tnllm_export.build import aotinductor_kernels

    return aotinductor_kernels


@pytest.fixture(scope="module")
def tracer(kernels):
    config = MODELS["tiny"].model_copy(update={"decoder_embed_dim": 96})

    class Tracer(ProgramTracer):
        """Leaves programs as torch.export made them, but for the ops."""

        def _trace(self, module, arguments, shapes):
            program = torch.export.export(module, tuple(arguments), dynamic_shapes=shapes, strict=False)
            return kernels.use_triton_ops(program, 90, 132)

    return Tracer(config, torch.bfloat16, CPU)


def targets_of(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_prefill_holds_the_packaged_chunk_op(tracer):
    program = tracer.prefill("last")
    ours = [target for target in targets_of(program) if target.startswith("tnllm.")]
    assert ours == ["tnllm.lightning_attention_packaged.default"] * 2
    program.module(check_guards=False)


def test_decode_updates_each_state_in_place_and_copies_none(tracer):
    batch = {0: tracer._batch}
    token = torch.zeros(2, 1, dtype=torch.int64)
    program = tracer._trace(
        _DecodeInPlace(tracer._model), (token, tracer._positions, tracer._state), (batch, batch, [batch] * 2)
    )
    targets = targets_of(program)
    assert [target for target in targets if target.startswith("tnllm.")] == [
        "tnllm.lightning_attention_step_packaged.default"
    ] * 2
    assert "aten.copy_.default" not in targets
    steps = [node for node in program.graph.nodes if "step_packaged" in str(node.target)]
    assert [node.args[4].name for node in steps] == ["past_state_0", "past_state_1"]
    # One output: the logits.
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    assert len(output.args[0]) == 1


def test_positions_may_begin_anywhere_in_a_buffer(tracer):
    nodes = {node.name: node.meta["val"] for node in tracer.prefill("last").graph.nodes if node.op == "placeholder"}
    assert tensor_is_aligned(nodes["input_ids"])
    assert not tensor_is_aligned(nodes["positions"])
