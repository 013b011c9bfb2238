"""The two programs of a model as modules: what is traced, for graphs and for packages alike."""

from torch import Tensor, nn

from tnllm_export.models.modeling import Logits, TransnormerForCausalLM


class PrefillProgram(nn.Module):
    """input_ids [B, T], lengths [B], positions [B], states -> logits, new states."""

    def __init__(self, causal_lm: TransnormerForCausalLM, logits: Logits) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.logits = logits

    def forward(
        self, input_ids: Tensor, lengths: Tensor, positions: Tensor, past_state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed many tokens."""
        answer: tuple[Tensor, list[Tensor]] = self.causal_lm(
            input_ids, lengths, positions, past_state, logits=self.logits
        )
        return answer


class DecodeProgram(nn.Module):
    """input_ids [B, 1], positions [B], states -> logits, new states."""

    def __init__(self, causal_lm: TransnormerForCausalLM) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: Tensor, positions: Tensor, past_state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Feed one token."""
        return self.causal_lm.decode(input_ids, positions, past_state)
