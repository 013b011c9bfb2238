"""What a caller may give as prompts, turned into lists of token ids."""

import operator
from collections.abc import Sequence
from numbers import Integral

from tnllm_export.errors import PromptError, TextUnsupportedError
from tnllm_export.models.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""


def encode_prompts(
    prompts: Prompt | Sequence[Prompt],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    limit: int | None,
) -> list[list[int]]:
    """Return the token ids of one prompt or of several; an empty prompt gives an empty list.

    Raises:
        TextUnsupportedError: Text without a tokenizer.
        PromptError: No prompt, text that is no Unicode, a token id that is no integer or outside the vocabulary, or
            more than `limit` tokens.
    """
    if isinstance(prompts, bytes | bytearray) or not hasattr(prompts, "__len__"):
        raise _wrong_type("prompt", prompts)
    if not isinstance(prompts, str) and len(prompts) == 0:
        raise PromptError("no prompt given; expected text or token ids, at least one token")
    one = isinstance(prompts, str) or isinstance(prompts[0], Integral)
    several = [prompts] if one else prompts
    return [_encode(f"prompt {index}", prompt, tokenizer, vocab_size, limit) for index, prompt in enumerate(several)]


def _encode(name: str, prompt: object, tokenizer: Tokenizer | None, vocab_size: int, limit: int | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TextUnsupportedError(f"{name} is text, but the model has no tokenizer; give token ids instead")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            # Bytes that are no UTF-8 come from a shell or from stdin as lone surrogates.
            raise PromptError(f"{name} is no UTF-8 text at character {error.start}; convert it to UTF-8") from error
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, bytes | bytearray):
        raise _wrong_type(name, prompt)
    else:
        try:
            ids = [operator.index(token) for token in prompt]  # type: ignore[attr-defined]
        except TypeError as error:
            raise PromptError(f"{name}: {error}; expected text or a sequence of integer token ids") from error
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise PromptError(
                f"{name}: token id {token} at {place} is outside the vocabulary; expected 0 … {vocab_size - 1}: "
                "encode the text with this model's tokenizer"
            )
    if limit is not None and len(ids) > limit:
        raise PromptError(f"{name} has {len(ids)} tokens; expected at most {limit}: shorten it or raise the limit")
    return ids


def _wrong_type(name: str, prompt: object) -> PromptError:
    return PromptError(f"{name} is of type {type(prompt).__name__}; expected text or a sequence of token ids")
