"""Runtimes to generate with: a tiny random model, its bundle, and one that says what a script tells it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tnllm_export.runtime.fake_graphs import captured_on_the_cpu
from tnllm_export.bundle import Bundle
from tnllm_export.export import export_bundle
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.models.tokenizer import Tokenizer
from tnllm_export.runtime import Runtime, RuntimeInfo, State, TorchRuntime, load_runtime

EOS = 2


@pytest.fixture(scope="session")
def model() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=97, decoder_embed_dim=48, decoder_layers=2, decoder_attention_heads=3, glu_dim=80, init_std=0.2
    )
    return TransnormerForCausalLM(config).requires_grad_(False)


@pytest.fixture(scope="session")
def torch_runtime(model: TransnormerForCausalLM) -> TorchRuntime:
    return TorchRuntime(model)


@pytest.fixture(scope="session")
def bundle(model: TransnormerForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("checkpoint")
    fields = {"model_type": "transnormer", **json.loads(model.config.model_dump_json())}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    return export_bundle(folder, tmp_path_factory.mktemp("bundle") / "tiny", dtype="float32")


@pytest.fixture(scope="session", params=["torch", "torch ahead", "onnxruntime"])
def runtime(request: pytest.FixtureRequest, bundle: Bundle, model: TransnormerForCausalLM) -> Runtime:
    if request.param == "torch ahead":
        return TorchRuntime(model, capture=captured_on_the_cpu)
    return load_runtime(bundle, request.param, threads=1)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Token 3 + b is byte b; 0, 1 and 2 are control tokens. Malformed bytes decode to U+FFFD."""
    return Tokenizer(
        Path("bytes"),
        259,
        frozenset({0, 1, EOS}),
        lambda text: [3 + byte for byte in text.encode()],
        lambda ids: bytes(token - 3 for token in ids).decode(errors="replace"),
    )


class ScriptedRuntime:
    """After n tokens in the state the likeliest next one is script[n]. The state is that number, one layer."""

    def __init__(self, script: Sequence[int], vocab_size: int = 259) -> None:
        config = TransnormerConfig(
            vocab_size=vocab_size, decoder_embed_dim=1, decoder_layers=1, decoder_attention_heads=1, glu_dim=1
        )
        self.info = RuntimeInfo("scripted", "cpu", "float32", config, "last")
        self.script = list(script)
        self.calls: list[list[list[int]]] = []

    def initial_state(self, batch: int) -> State:
        return torch.zeros(batch, 1, 2, 1)

    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, Tensor)
        self.calls.append(input_ids.tolist())
        assert state[:, 0, 0, 0].tolist() == positions.tolist()
        present = state + lengths.view(-1, 1, 1, 1)
        return self._logits(present), present

    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        return self.prefill(input_ids, torch.ones(input_ids.shape[0], dtype=torch.int32), positions, state)

    def host_state(self, state: State) -> list[Tensor]:
        assert isinstance(state, Tensor)
        return [state.clone()]

    def device_state(self, tensors: list[Tensor]) -> State:
        return tensors[0].clone()

    def _logits(self, state: Tensor) -> Tensor:
        logits = torch.zeros(state.shape[0], self.info.config.vocab_size)
        for row, read in enumerate(state[:, 0, 0, 0].int().tolist()):
            logits[row, self.script[read] if read < len(self.script) else EOS] = 1
        return logits
