"""The inputs on which runtimes are compared: fresh random token ids, and real text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnllm_export.errors import PromptError
from tnllm_export.verify.records import CaseSummary

SAMPLE_TEXT = """\
It was late in the evening when the old captain came down to the harbour. The rain had stopped, and the lamps along the
quay were lit one after another. He had promised his daughter that he would write as soon as the ship was ready, but he
had not found the words. "You will miss the tide," said the boy who carried his chest, "if you stand here much longer."
The captain laughed and gave him a coin. Then he looked once more at the town: the church on the hill, the white houses,
the garden behind the wall where he had played as a child. In the morning all of it would be a thin grey line, and by
noon there would be nothing but water. He did not feel sad. A man who has been at sea for forty years knows that every
harbour is a beginning, and that most of the things worth telling happen a long way from home."""

MIN_TEXT_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """One batch: a ragged prompt and what is fed after it.

    Attributes:
        name: Short name for tables.
        description: For the reader of the report.
        input_ids: [B, T] int64; tokens at t >= lengths[b] are padding with ids that must not matter.
        lengths: [B] int32.
        continuation: [B, n] int64, fed token by token after the prompt, whatever the model would have said.
        piece: Tokens per call where the prompt is fed in pieces.
        greedy: Tokens of free-running greedy decoding.
    """

    name: str
    description: str
    input_ids: Tensor
    lengths: Tensor
    continuation: Tensor
    piece: int
    greedy: int

    def summary(self) -> CaseSummary:
        """Return what a report says about this case."""
        lengths = tuple(int(length) for length in self.lengths)
        decoded = self.continuation.shape[1]
        return CaseSummary(self.name, self.description, lengths, self.piece, decoded, self.greedy)

    def work(self, *, pieces: bool) -> int:
        """Return how many tokens, padding included, a runtime is fed."""
        B, T = self.input_ids.shape
        return B * (T * (2 if pieces else 1) + self.continuation.shape[1] + self.greedy)


def random_case(vocab_size: int, seed: int, lengths: Sequence[int], decoded: int, piece: int, greedy: int) -> Case:
    """Draw uniformly distributed token ids for a ragged batch, padding included."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (len(lengths), max(lengths) + decoded), generator=generator)
    return Case(
        name="random",
        description="uniformly random token ids",
        input_ids=ids[:, : max(lengths)].contiguous(),
        lengths=torch.tensor(list(lengths), dtype=torch.int32),
        continuation=ids[:, max(lengths) :].contiguous(),
        piece=piece,
        greedy=greedy,
    )


def check_text_length(ids: Sequence[int], source: str) -> None:
    """Raise PromptError where a text has fewer than 8 tokens: too few to compare anything."""
    if len(ids) < MIN_TEXT_TOKENS:
        raise PromptError(f"{source} has {len(ids)} tokens; expected at least {MIN_TEXT_TOKENS} to verify on")


def text_case(ids: Sequence[int], source: str, longest: int, decoded: int, piece: int, greedy: int) -> Case:
    """Cut a text's token ids into two rows, a long and a short prompt, each with its true continuation.

    Raises PromptError for a text of fewer than 8 tokens.
    """
    check_text_length(ids, source)
    decoded = min(decoded, len(ids) // 2)
    prompt = min(longest, len(ids) - decoded)
    short = max(1, prompt // 3)
    whole = torch.tensor(list(ids[: prompt + decoded]), dtype=torch.int64)
    # The short row's prompt is padded with the text that follows it.
    rows = whole[:prompt].expand(2, -1).contiguous()
    continuation = torch.stack((whole[prompt:], whole[short : short + decoded]))
    lengths = torch.tensor([prompt, short], dtype=torch.int32)
    return Case("text", f"real text: {source}", rows, lengths, continuation, piece, greedy)
