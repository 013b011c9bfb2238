"""What keeps a small text from being learned by heart: dropout, which the released model has none of, and averaging."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tnllm_export.models.modeling import GatedLinearAttention, SimpleGatedLinearUnit, TransnormerForCausalLM


@contextmanager
def dropout(model: TransnormerForCausalLM, rate: float) -> Iterator[None]:
    """Within the context, drop out what the embedding and each half of each layer give, while `model.training`."""

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training or rate == 0:
            return output
        if isinstance(output, tuple):
            # The mixers of tokens return their state beside the output.
            return (F.dropout(output[0], rate), *output[1:])
        return F.dropout(output, rate)

    dropped = (nn.Embedding, GatedLinearAttention, SimpleGatedLinearUnit)
    handles = [module.register_forward_hook(drop) for module in model.modules() if isinstance(module, dropped)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move every parameter of `average` towards `model`: a <- decay a + (1 - decay) p."""
    for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(parameter, 1 - decay)
