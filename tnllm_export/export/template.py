"""What is traced of a model: one layer of each kind, of which the graph's layers are copies."""

from dataclasses import dataclass
from typing import Self

from tnllm_export.models.config import TransnormerConfig

MODEL = "causal_lm"
"""Name under which a program module holds the model."""


@dataclass(frozen=True)
class Template:
    """A model of one layer of each kind.

    Attributes:
        config: Its configuration.
        kinds: For each layer of the whole model, which of its layers it is like.
    """

    config: TransnormerConfig
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, config: TransnormerConfig) -> Self:
        """Return the template of a model.

        Kinds are numbered in order of appearance: the first layer, and the others with and without LRPE. The first is
        a kind of its own because it computes what all share, a mask of the padding say.
        """
        flags = config.linear_use_lrpe_list
        others = {flag: kind for kind, flag in enumerate(dict.fromkeys(flags[1:]), start=1)}
        update = {"decoder_layers": 1 + len(others), "linear_use_lrpe_list": (flags[0], *others)}
        return cls(config.model_copy(update=update), (0, *(others[flag] for flag in flags[1:])))
