"""What the demo model knows: its loss on whole chapters, and text that it writes."""

import math
from collections.abc import Sequence

import sentencepiece
import torch
import torch.nn.functional as F  # noqa: N812

from tnllm_export.demo.settings import Evaluation
from tnllm_export.demo.tokenizer import END_OF_TEXT
from tnllm_export.models.modeling import TransnormerForCausalLM


@torch.no_grad()
def evaluate(
    model: TransnormerForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, chapters: Sequence[str]
) -> Evaluation:
    """Predict every token of every chapter, each chapter from position 0 to its end with the state carried along.

    The end token stands before a chapter, as it does in training, so that its first token is predicted too, and its
    own end is the last token that is predicted.
    """
    total = 0.0
    count = 0
    for chapter in chapters:
        ids = [END_OF_TEXT, *tokenizer.encode(chapter), END_OF_TEXT]
        # [1, N]
        tokens = torch.tensor([ids], device=model.lm_head.weight.device)
        logits, _ = model(tokens[:, :-1])
        total += F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return Evaluation(
        perplexity=math.exp(total / count),
        word_perplexity=math.exp(total / sum(len(chapter.split()) for chapter in chapters)),
        bits_per_character=total / math.log(2) / sum(len(chapter) for chapter in chapters),
        tokens=count,
    )


@torch.no_grad()
def continue_text(
    model: TransnormerForCausalLM,
    tokenizer: sentencepiece.SentencePieceProcessor,
    prompt: str,
    *,
    tokens: int = 120,
    temperature: float = 0.8,
    top_p: float = 0.9,
    seed: int = 0,
) -> str:
    """Write on from `prompt`, at most `tokens` tokens or to the end token; return the prompt and what follows."""
    generator = torch.Generator().manual_seed(seed)
    device = model.lm_head.weight.device
    ids = list(tokenizer.encode(prompt))
    logits, state = model(torch.tensor([ids], device=device), logits="last")
    for _ in range(tokens):
        probabilities, order = (logits[0].cpu() / temperature).softmax(-1).sort(descending=True)
        # A token stays while those before it hold less than top_p; the first one always does.
        probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
        token = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        if token == END_OF_TEXT:
            break
        position = torch.tensor([len(ids)], device=device)
        logits, state = model.decode(torch.tensor([[token]], device=device), position, state)
        ids.append(token)
    return str(tokenizer.decode(ids))
