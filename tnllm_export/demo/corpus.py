"""The demo model's training text: Jane Austen's novels from the Debian package r-cran-janeaustenr, clean and split."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tnllm_export.demo.r_database import read_character_vectors
from tnllm_export.errors import CorpusError

PACKAGE_FOLDER = Path("/usr/lib/R/site-library/janeaustenr")
"""Where the Debian package puts the novels."""

PARAGRAPH_BREAK = "\n\n"

_TITLES = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}
_CHAPTER = re.compile(r"chapter +([ivxlc]+|\d+)\.?", re.IGNORECASE)
_VOLUME = re.compile(r"volume +([ivxlc]+|\d+)\.?", re.IGNORECASE)
# The last line of a novel's own text, or the first of what an editor appended.
_END = re.compile(r"the end|finis|\*vide .*|a note on the text", re.IGNORECASE)
_STRAIGHT_QUOTES = str.maketrans("“”‘’\t", "\"\"'' ")
_MIN_CHAPTER_CHARACTERS = 8000


@dataclass(frozen=True)
class Novel:
    """One text in reading order; a chapter is paragraphs joined by PARAGRAPH_BREAK."""

    title: str
    chapters: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Novels, and where they are from, in words fit for a model card; `path` is what finds them again."""

    source: str
    licence: str
    path: str
    novels: tuple[Novel, ...]

    def save(self, path: Path) -> None:
        """Write a `.json` file that `read_corpus` takes: training then needs neither R's files nor their reader."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1), encoding="utf-8")

    def split(self, held_out: float = 0.05) -> tuple[list[str], list[str]]:
        """Return chapters for training, and for validation the last `held_out` of each novel's, at least one of all."""
        training: list[str] = []
        validation: list[str] = []
        for novel in self.novels:
            count = max(round(held_out * len(novel.chapters)), 1 if len(novel.chapters) > 1 else 0)
            kept = len(novel.chapters) - count
            training += novel.chapters[:kept]
            validation += novel.chapters[kept:]
        if not training or not validation:
            raise CorpusError(
                f"{self.source}: too short to split into training and validation text; "
                f"expected at least two chapters, or {2 * _MIN_CHAPTER_CHARACTERS} characters"
            )
        return training, validation


def read_corpus(path: Path | None = None) -> Corpus:
    """Read and clean the training text.

    Args:
        path: The R package's folder, or a folder that the Debian package was unpacked into; a `.json` that
            `Corpus.save` wrote; or a `.txt` with text of your own. Default: where Debian installs the package.

    Raises:
        CorpusError: Nothing usable is there.
    """
    path = PACKAGE_FOLDER if path is None else path
    if path.is_dir():
        return _read_package(path)
    if not path.is_file():
        raise CorpusError(f"{path}: not found; {_HOW_TO_GET_IT}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: can't be read as UTF-8 text ({error})") from error
    return _parse_saved(path, text) if path.suffix == ".json" else _parse_plain(path, text)


_HOW_TO_GET_IT = (
    "expected the novels of the Debian package r-cran-janeaustenr: run apt-get install r-cran-janeaustenr, "
    "or apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb FOLDER and pass --corpus FOLDER"
)


def clean_novel(lines: list[str]) -> tuple[str, ...]:
    """Turn a transcript's lines into chapters of paragraphs.

    Front and back matter and headings go; wrapped lines are joined; marks for italics, footnotes and editors'
    brackets go; dashes become "—", quotes stay straight, runs of spaces become one.
    """
    chapters: list[list[str]] = []
    paragraph: list[str] = []
    for line in [*(line.strip() for line in lines), ""]:
        if _END.fullmatch(line):
            break
        heading = _CHAPTER.fullmatch(line)
        if line and not heading and not _VOLUME.fullmatch(line):
            paragraph.append(line)
            continue
        if paragraph and chapters:
            chapters[-1].append(clean_paragraph(paragraph))
        paragraph = []
        if heading:
            chapters.append([])
    if paragraph and chapters:
        chapters[-1].append(clean_paragraph(paragraph))
    return tuple(PARAGRAPH_BREAK.join(filter(None, chapter)) for chapter in chapters)


def clean_paragraph(lines: list[str]) -> str:
    """Join a paragraph's wrapped lines and make its typography uniform; "" if nothing but ornaments is left."""
    text = " ".join(lines)
    text = text.translate(_STRAIGHT_QUOTES)
    text = re.sub(r" *\[[^\]]*\]|[_*]", "", text)
    text = re.sub(r" *(?:-{2,}|[–—]+) *", "—", text)
    # A hyphen at the end of a line belongs to the compound that it breaks: "twenty-" "one".
    text = re.sub(r"(?<=\w)- (?=\w)", "-", text)
    text = re.sub(r" +", " ", text).strip()
    return text if re.search(r"\w", text) else ""


def _read_package(path: Path) -> Corpus:
    candidates = (path, path / PACKAGE_FOLDER.relative_to("/"), path / "janeaustenr")
    package = next((folder for folder in candidates if (folder / "data" / "Rdata.rdx").is_file()), None)
    if package is None:
        raise CorpusError(f"{path}: no data/Rdata.rdx in it; {_HOW_TO_GET_IT}")
    vectors = read_character_vectors(package / "data")
    novels = tuple(
        Novel(title, clean_novel(vectors[name])) for name, title in sorted(_TITLES.items()) if name in vectors
    )
    if not all(novel.chapters for novel in novels) or not novels:
        raise CorpusError(f"{package}: holds {', '.join(vectors) or 'nothing'}; {_HOW_TO_GET_IT}")
    version = re.search(r"^Version: *(\S+)", (package / "DESCRIPTION").read_text(encoding="utf-8"), re.MULTILINE)
    return Corpus(
        source="Jane Austen's six novels, from the Debian package r-cran-janeaustenr"
        + (f" (janeaustenr {version[1]})" if version else ""),
        licence="the novels are in the public domain; the package is under the MIT licence",
        path=str(PACKAGE_FOLDER),
        novels=novels,
    )


def _parse_saved(path: Path, text: str) -> Corpus:
    try:
        fields = json.loads(text)
        novels = tuple(Novel(str(novel["title"]), tuple(map(str, novel["chapters"]))) for novel in fields["novels"])
        return Corpus(str(fields["source"]), str(fields["licence"]), str(fields["path"]), novels)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorpusError(f"{path}: not a corpus that this package saved ({error!r}); {_HOW_TO_GET_IT}") from error


def _parse_plain(path: Path, text: str) -> Corpus:
    chapters = [""]
    for block in re.split(r"\n\s*\n", text):
        paragraph = clean_paragraph([line.strip() for line in block.splitlines()])
        if len(chapters[-1]) >= _MIN_CHAPTER_CHARACTERS:
            chapters.append("")
        chapters[-1] += (PARAGRAPH_BREAK if chapters[-1] and paragraph else "") + paragraph
    return Corpus(
        f"the text file {path.name}",
        "as its owner states",
        path.name,
        (Novel(path.stem, tuple(filter(None, chapters))),),
    )
