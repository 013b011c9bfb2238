"""Text to token ids and back, by SentencePiece's `tokenizer.model` or tokenizers' `tokenizer.json`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tnllm_export.errors import TokenizerError

_REMEDY = "take the tokenizer file from the checkpoint's source"
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
        path: The file it was read from.
        vocab_size: Number of token ids.
        special_ids: Control tokens such as begin and end of text; they have no text.
    """

    path: Path
    vocab_size: int
    special_ids: frozenset[int]
    _encode: Callable[[str], list[int]]
    _decode: Callable[[list[int]], str]

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids. No begin-of-text token is added."""
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids' text. Control tokens are skipped; bytes that are no UTF-8 become U+FFFD."""
        text = self._decode([token for token in ids if token not in self.special_ids])
        if _BROKEN not in text:
            return text
        # One wrong byte makes tokenizers give up the whole run of bytes, the good characters in it included, which
        # a stream has shown by then. What a stream shows is what counts, and is the better text.
        stream = self.decode_stream()
        return "".join([*(stream.push(token) for token in ids), stream.flush()])

    def decode_stream(self, prompt_ids: Sequence[int] = ()) -> "DecodeStream":
        """Return an incremental decoder.

        Args:
            prompt_ids: What stands before the stream. Its text is not repeated, but a first piece that continues it
                keeps its leading space, and a character that the prompt begins is finished.
        """
        return DecodeStream(self._decode, self.special_ids, prompt_ids)


class DecodeStream:
    """Decodes token by token; all that is returned, put together, is `decode` of all ids.

    A token's text depends on its neighbours: the first piece loses its leading space, and a character may be spread
    over several tokens. So a window of ids is decoded anew for each token, and what is new and can't change any more
    is returned. The window starts at a token before which text has already been returned.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], special_ids: frozenset[int], prompt_ids: Sequence[int]
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._window: list[int] = []
        self._fresh = 0  # index into the window: the first id that is not there as context only
        self._returned = 0  # characters of the window's text that have been returned
        for token in prompt_ids:
            self.push(token)

    def push(self, token: int) -> str:
        """Take the next id; return the text that is settled by it, perhaps none."""
        if token in self._special_ids:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        # An unfinished character shows as U+FFFD at the end.
        settled = len(text.rstrip(_BROKEN))
        new = text[self._returned : settled]
        self._returned = max(self._returned, settled)
        if settled == len(text):
            self._shorten()
        return new

    def flush(self) -> str:
        """Return what is still held back, as it is: an unfinished character becomes U+FFFD."""
        text = self._decode(self._window)
        new = text[self._returned :]
        self._returned = len(text)
        return new

    def _shorten(self) -> None:
        # Ids that decode to nothing by themselves (a lone space) are no context: what follows would lose its space.
        text = self._decode(self._window[self._fresh :])
        if text:
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._returned = len(text)


def find_tokenizer(folder: Path) -> Path | None:
    """Return the folder's `tokenizer.model`, else its `tokenizer.json`, else None."""
    candidates = (folder / "tokenizer.model", folder / "tokenizer.json")
    return next((path for path in candidates if path.is_file()), None)


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: `tokenizer.model` or `tokenizer.json`; the suffix tells which library reads it.
        vocab_size: The model's; the tokenizer's must be the same.

    Raises:
        TokenizerError: The file is absent or broken, or has another vocabulary size.
    """
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file; {_REMEDY}")
    tokenizer = _load_json(path) if path.suffix == ".json" else _load_sentencepiece(path)
    if tokenizer.vocab_size != vocab_size:
        raise TokenizerError(
            f"{path}: has {tokenizer.vocab_size} tokens; expected {vocab_size}, the model's vocab_size, {_REMEDY}"
        )
    return tokenizer


def _load_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
        size = processor.get_piece_size()
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{path}: not a SentencePiece model ({_one_line(error)}); {_REMEDY}") from error
    special = frozenset(token for token in range(size) if processor.is_control(token))
    return Tokenizer(path, size, special, processor.encode, processor.decode)


def _load_json(path: Path) -> Tokenizer:
    import tokenizers  # noqa: PLC0415

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{path}: not a tokenizers file ({_one_line(error)}); {_REMEDY}") from error
    # A file may carry what training batches needed; a prompt must come whole, and alone.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    return Tokenizer(path, tokenizer.get_vocab_size(with_added_tokens=True), special, encode, decode)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
