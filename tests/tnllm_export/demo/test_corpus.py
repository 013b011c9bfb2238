import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from tnllm_export.demo.corpus import Corpus, Novel, clean_novel, clean_paragraph, read_corpus
from tnllm_export.errors import CorpusError

TRANSCRIPT = """\
SENSE AND SENSIBILITY

by Jane Austen

CHAPTER 1


The family of Dashwood had _long_ been settled in
Sussex.  Their estate was twenty-
five miles off--

“Indeed,” said she;--'not
so far!'

                    ***

VOLUME II

Chapter II.

It was,* she
thought [a note of the editor], well.

Finis

A NOTE ON THE TEXT

Printed in Edinburgh.
""".splitlines()


def test_a_transcript_becomes_chapters_of_joined_paragraphs_without_front_and_back_matter() -> None:
    assert clean_novel(TRANSCRIPT) == (
        "The family of Dashwood had long been settled in Sussex. Their estate was twenty-five miles off—\n\n"
        "\"Indeed,\" said she;—'not so far!'",
        "It was, she thought, well.",
    )


@pytest.mark.parametrize(
    ("lines", "cleaned"),
    [
        (["a -- b", "c --", "d"], "a—b c—d"),
        (["Lord ----, and"], "Lord—, and"),
        (["it’s ‘so’ – “yes”"], "it's 'so'—\"yes\""),
        (["*", "* *"], ""),
        (["[To Mrs. Weston.]"], ""),
    ],
)
def test_typography_is_made_uniform(lines: list[str], cleaned: str) -> None:
    assert clean_paragraph(lines) == cleaned


def test_the_last_chapters_of_each_novel_validate() -> None:
    novels = tuple(Novel(str(n), tuple(f"{n}.{chapter}" for chapter in range(40))) for n in range(2))
    training, validation = Corpus("", "", "", novels).split(0.05)
    assert validation == ["0.38", "0.39", "1.38", "1.39"]
    assert len(training) == 76
    assert not set(training) & set(validation)


def test_a_saved_corpus_reads_back_as_it_was(tmp_path: Path, small_corpus: Corpus) -> None:
    small_corpus.save(tmp_path / "corpus.json")
    assert read_corpus(tmp_path / "corpus.json") == small_corpus


def test_a_text_file_is_cut_into_chapters_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n}\nhas two lines. " + "word " * 300 for n in range(12)]
    (tmp_path / "own.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    corpus = read_corpus(tmp_path / "own.txt")
    (novel,) = corpus.novels
    assert novel.title == "own"
    assert "own.txt" in corpus.source
    assert len(novel.chapters) == 2
    assert "\n\n".join(novel.chapters).count("Paragraph") == 12
    assert novel.chapters[0].startswith("Paragraph 0 has two lines. word")


def test_the_r_package_is_read_wherever_it_was_unpacked(tmp_path: Path) -> None:
    _write_r_package(tmp_path / "usr/lib/R/site-library/janeaustenr", {"sensesensibility": TRANSCRIPT})
    corpus = read_corpus(tmp_path)
    assert corpus == read_corpus(tmp_path / "usr/lib/R/site-library/janeaustenr")
    assert "janeaustenr 1.0.0" in corpus.source
    assert corpus.novels == (Novel("Sense and Sensibility", clean_novel(TRANSCRIPT)),)


def test_a_broken_r_database_is_named(tmp_path: Path) -> None:
    _write_r_package(tmp_path, {"emma": TRANSCRIPT})
    (tmp_path / "data/Rdata.rdb").write_bytes((tmp_path / "data/Rdata.rdb").read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"can't read the R database .*; install the package"):
        read_corpus(tmp_path)


def test_a_package_without_the_novels_is_refused(tmp_path: Path) -> None:
    _write_r_package(tmp_path, {"poems": ["CHAPTER 1", "Roses are red."]})
    with pytest.raises(CorpusError, match="holds poems; expected the novels"):
        read_corpus(tmp_path)


def test_what_is_missing_is_said_with_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"novels": []}', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("One line.", encoding="utf-8")
    for path, found in [
        (tmp_path / "nowhere", "not found"),
        (tmp_path, "no data/Rdata.rdx"),
        (tmp_path / "broken.json", "not a corpus"),
    ]:
        with pytest.raises(CorpusError, match=found) as caught:
            read_corpus(path)
        assert "apt-get install r-cran-janeaustenr" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match="UTF-8"):
        read_corpus(tmp_path / "latin.txt")
    with pytest.raises(CorpusError, match="too short"):
        read_corpus(tmp_path / "short.txt").split()


def test_a_saved_corpus_is_plain_json(tmp_path: Path, small_corpus: Corpus) -> None:
    small_corpus.save(tmp_path / "corpus.json")
    fields = json.loads((tmp_path / "corpus.json").read_text(encoding="utf-8"))
    assert set(fields) == {"source", "licence", "path", "novels"}


def _write_r_package(folder: Path, vectors: dict[str, list[str]]) -> None:
    rdata = pytest.importorskip("rdata")
    (folder / "data").mkdir(parents=True)
    (folder / "DESCRIPTION").write_text("Package: janeaustenr\nVersion: 1.0.0\n", encoding="utf-8")
    records, positions = b"", {}
    for name, lines in vectors.items():
        plain = folder / "plain"
        rdata.write_rds(plain, np.array(lines), compression=None)
        data = plain.read_bytes()
        record = len(data).to_bytes(4, "big") + zlib.compress(data)
        positions[name] = np.array([len(records), len(record)], dtype=np.int32)
        records += record
        plain.unlink()
    (folder / "data/Rdata.rdb").write_bytes(records)
    rdata.write_rds(folder / "data/Rdata.rdx", {"variables": positions, "compressed": True})
