"""Every lowering, exported and run, against the released implementation's answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file

from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.export import export_bundle
from tnllm_export.runtime import load_runtime

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
TOLERANCE = 1e-5


def relative_error(found, reference):
    assert found.shape == reference.shape
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


class Evaluated:
    """A bundle run by ONNX's reference evaluator, behind as much of the runtime protocol as these tests use."""

    def __init__(self, bundle: Bundle) -> None:
        self.config = bundle.manifest.config
        self.graphs = {path: ReferenceEvaluator(str(path)) for path in (bundle.prefill_path, bundle.decode_path)}
        self.bundle = bundle

    def initial_state(self, batch):
        return [np.zeros(self.config.state_shape(n, batch), np.float32) for n in range(self.config.decoder_layers)]

    def prefill(self, input_ids, lengths, positions, state):
        return self._run(self.bundle.prefill_path, state, input_ids=input_ids, lengths=lengths, positions=positions)

    def decode(self, input_ids, positions, state):
        return self._run(self.bundle.decode_path, state, input_ids=input_ids, positions=positions)

    def host_state(self, state):
        return [torch.from_numpy(layer) for layer in state]

    def _run(self, path, state, **inputs):
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        feeds |= {f"past_state.{layer}": tensor for layer, tensor in enumerate(state)}
        logits, *present = self.graphs[path].run(None, feeds)
        return torch.from_numpy(logits), present


@pytest.mark.parametrize("lowering", ["contrib", "hybrid", "matmul", "plugin", "standard"])
@pytest.mark.parametrize("name", ["scaled_embedding", "unscaled_embedding"])
def test_bundles_answer_as_the_released_implementation_does(tmp_path, name, lowering):
    export_bundle(GOLDEN / name, tmp_path / "bundle", dtype="float32", lowering=lowering, logits="all")
    bundle = open_bundle(tmp_path / "bundle")
    expected = load_file(GOLDEN / name / "golden.safetensors")
    if lowering == "standard":  # ONNX Runtime does not take opset 27 yet
        assert_golden(Evaluated(bundle), expected)
    else:
        assert_golden(load_runtime(bundle, "onnxruntime"), expected)
    assert_golden(load_runtime(bundle, "torch"), expected)


def assert_golden(runtime, expected):
    B, T = expected["input_ids"].shape
    full, none = torch.full((B,), T, dtype=torch.int32), torch.zeros(B, dtype=torch.int64)

    logits, state = runtime.prefill(expected["input_ids"], full, none, runtime.initial_state(B))
    assert relative_error(logits, expected["prefill_logits"]) < TOLERANCE
    for layer, found in enumerate(runtime.host_state(state)):
        assert relative_error(found, expected[f"prefill_state.{layer}"]) < TOLERANCE

    for step, token in enumerate(expected["decode_ids"].T):
        logits, state = runtime.decode(token[:, None].contiguous(), torch.full((B,), T + step), state)
        assert relative_error(logits, expected["decode_logits"][:, step]) < TOLERANCE
    for layer, found in enumerate(runtime.host_state(state)):
        assert relative_error(found, expected[f"decode_state.{layer}"]) < TOLERANCE
