"""Prefill of a ragged batch of prompts, in pieces of a fixed size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnllm_export.generate.sequence import RunningSequence
from tnllm_export.progress import Progress
from tnllm_export.runtime import Runtime, State


def read_prompts(
    runtime: Runtime, rows: Sequence[RunningSequence], state: State, chunk: int, progress: Progress
) -> tuple[Tensor | None, State]:
    """Bring all that is unread into the state, `chunk` tokens of each row at a time.

    Returns:
        Logits [B, vocab] after each row's last token, and the state. None for the logits where every row continues a
        session that stopped between two tokens: it goes on as it would have, by a decode step.
    """
    if all(len(row.unread) == 1 and not row.prompt_ids for row in rows):
        return None, state
    unread = [row.unread for row in rows]
    longest = max(len(ids) for ids in unread)
    for start in range(0, longest, chunk):
        pieces = [ids[start : start + chunk] for ids in unread]
        state = _read_pieces(runtime, rows, pieces, state)
        progress("reading the prompt", min(start + chunk, longest), longest, "tokens")
    # A row without logits has a token to read, so now it has some.
    return torch.stack([row.logits for row in rows if row.logits is not None]), state


def _read_pieces(runtime: Runtime, rows: Sequence[RunningSequence], pieces: Sequence[list[int]], state: State) -> State:
    """Feed one piece of each row, padded on the right; a row that is through has length 0 and keeps its logits."""
    T = max(len(piece) for piece in pieces)
    input_ids = torch.full((len(rows), T), runtime.info.config.pad_token_id)
    for index, piece in enumerate(pieces):
        input_ids[index, : len(piece)] = torch.tensor(piece, dtype=torch.int64)
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int32)
    positions = torch.tensor([row.position for row in rows])
    logits, state = runtime.prefill(input_ids, lengths, positions, state)
    for index, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
        if piece:
            row.position += len(piece)
            # A copy: with the logits of all tokens, a view would keep [B, T, vocab] alive.
            own = logits[index, len(piece) - 1] if logits.dim() == 3 else logits[index]
            row.logits = own.to("cpu", copy=True)  # beside those of a session, whatever device computed them
    return state
