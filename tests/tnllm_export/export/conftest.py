"""Models as checkpoint folders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tnllm_export.models.modeling import TransnormerForCausalLM


@pytest.fixture
def write_checkpoint() -> Callable[[Path, TransnormerForCausalLM], Path]:
    """Write a model as a Hugging Face style folder and return the folder."""

    def write(folder: Path, model: TransnormerForCausalLM) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model.config.model_dump(mode="json")))
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, folder / "model.safetensors")
        return folder

    return write
