"""The least that a call has to move and to multiply."""

from dataclasses import dataclass

from tnllm_export.bench.records import Ceilings
from tnllm_export.bundle import DTYPES
from tnllm_export.models.config import TransnormerConfig

_STATE_BYTES = 4  # float32, always


@dataclass(frozen=True)
class Work:
    """Bytes that one call has to move, and FLOPs of its matrix products."""

    bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        """Return what the slower of the two takes at the measured ceilings."""
        return max(self.bytes / ceilings.bandwidth, self.flops / ceilings.matmul)


def state_bytes(config: TransnormerConfig) -> int:
    """Return the size of one sequence's state."""
    return _STATE_BYTES * config.state_elements(1)


def work_of(config: TransnormerConfig, dtype: str, batch: int, tokens: int, *, all_logits: bool = False) -> Work:
    """Return the work of feeding `batch` sequences of `tokens` tokens.

    Bytes: every weight matrix once, the embeddings of the tokens, the state read and written. FLOPs: two for each
    weight and token, and the products of attention as a recurrence, k vᵀ and qᵀ S. The head is multiplied for the last
    token only, or for `all_logits`. Activations and logits move too, but need not: a floor leaves them out.
    """
    d, itemsize = config.decoder_embed_dim, DTYPES[dtype].itemsize
    layers = config.decoder_layers * (5 * d * d + 3 * d * config.glu_dim)
    head = d * config.vocab_size
    states = state_bytes(config)
    rows = batch * tokens
    moved = itemsize * (layers + head + rows * d) + 2 * batch * states
    attention = 4 * rows * (states // _STATE_BYTES)
    heads = rows if all_logits else batch
    return Work(bytes=moved, flops=2 * rows * layers + 2 * heads * head + attention)
