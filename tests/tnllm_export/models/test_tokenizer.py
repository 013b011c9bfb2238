"""Both tokenizer formats: round trips, streaming that equals decoding at once, and files that don't fit."""

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm_export.errors import TokenizerError
from tnllm_export.models.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

VOCAB_SIZE = 360
SENTENCES = [
    "The lamb lay down beside the lion, and the night was long.",
    "Light travels faster than sound; thunder follows lightning.",
    "A quick brown fox jumps over the lazy dog again and again.",
    "Where there is smoke there is fire, or so they say.",
    "  two  spaces   and three, kept as they are",
] * 5
TEXTS = [
    "The lion and the lamb",
    " leading space",
    "Grüße, 世界 — 🦙🧵 ",
    "a\nb\tc  d",
    "é\u0301\N{REPLACEMENT CHARACTER}x",
]


def train_sentencepiece(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def train_tokenizers(byte_level: bool) -> tokenizers.Tokenizer:
    special = ["<pad>", "<s>", "</s>"]
    if byte_level:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
                tokenizers.decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if not byte_level:
        # Byte tokens had to be "special" to get their places, but they have text.
        plain = tokenizer.to_str().replace('"special":true', '"special":false')
        tokenizer = tokenizers.Tokenizer.from_str(plain)
        tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return tokenizer


KINDS = ("sentencepiece", "sentencepiece-keep-spaces", "byte-level", "byte-fallback")


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = {kind: folder / f"{kind}{'.model' if 'piece' in kind else '.json'}" for kind in KINDS}
    paths["sentencepiece"].write_bytes(train_sentencepiece())
    paths["sentencepiece-keep-spaces"].write_bytes(
        train_sentencepiece(normalization_rule_name="identity", remove_extra_whitespaces=False)
    )
    train_tokenizers(byte_level=True).save(str(paths["byte-level"]))
    train_tokenizers(byte_level=False).save(str(paths["byte-fallback"]))
    return {kind: load_tokenizer(path, VOCAB_SIZE) for kind, path in paths.items()}


def stream(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    decoder = tokenizer.decode_stream(prompt_ids or [])
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("kind", ["sentencepiece-keep-spaces", "byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(all_tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = all_tokenizers[kind]
    ids = tokenizer.encode(text)
    assert ids
    assert not tokenizer.special_ids & set(ids)  # in particular no begin of text
    assert tokenizer.decode(ids) == text


def test_prompts_are_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    tokenizer = train_tokenizers(byte_level=True)
    whole = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(max_length=2)
    tokenizer.enable_padding(length=50, pad_id=0, pad_token="<pad>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(whole) > 2
    assert load_tokenizer(tmp_path / "tokenizer.json", VOCAB_SIZE).encode(TEXTS[0]) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_have_no_text(all_tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = all_tokenizers[kind]
    ids = tokenizer.encode("The lion")
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode([1, *ids[:1], 0, *ids[1:], 2]) == tokenizer.decode(ids) == "The lion"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(all_tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = all_tokenizers[kind]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
def test_streaming_any_ids_equals_decoding_them(
    all_tokenizers: dict[str, Tokenizer], kind: str, ids: list[int]
) -> None:
    tokenizer = all_tokenizers[kind]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=30))
def test_streaming_mostly_bytes_equals_decoding_them(
    all_tokenizers: dict[str, Tokenizer], kind: str, ids: list[int]
) -> None:
    tokenizer = all_tokenizers[kind]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_continuation_keeps_the_space_between_prompt_and_answer(
    all_tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = all_tokenizers[kind]
    ids = tokenizer.encode("The lamb and the lion")
    prompt, answer = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    said = "".join(stream(tokenizer, answer, prompt))
    assert tokenizer.decode(prompt) + said == "The lamb and the lion"


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_as_soon_as_it_is_settled(all_tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = all_tokenizers[kind]
    decoder = tokenizer.decode_stream()
    ids = tokenizer.encode("lion 🦙 lamb")
    shown = ""
    for count, token in enumerate(ids, 1):
        shown += decoder.push(token)
        assert shown == tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_an_unfinished_character_is_shown_as_broken_at_the_end_only(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["sentencepiece"]
    ids = tokenizer.encode("lion 🦙")[:-1]
    shown = stream(tokenizer, ids)
    assert "".join(shown[:-1]) == "lion "
    assert set(shown[-1]) == {"\N{REPLACEMENT CHARACTER}"}


def test_sentencepiece_is_preferred_over_json(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").touch()
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.model").touch()
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"


@pytest.mark.parametrize("kind", KINDS)
def test_another_vocabulary_size_is_refused_with_both_numbers(all_tokenizers: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(TokenizerError, match=rf"has {VOCAB_SIZE} tokens; expected 64000") as caught:
        load_tokenizer(all_tokenizers[kind].path, 64000)
    assert str(all_tokenizers[kind].path) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"\xff" * 100])
def test_a_broken_tokenizer_is_named_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path, VOCAB_SIZE)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_absent_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        load_tokenizer(tmp_path / "tokenizer.model", VOCAB_SIZE)
