"""Tables, links and names in the README and the docs are those of the code."""

import re
from pathlib import Path

import pytest

from tnllm_export import errors
from tnllm_export.cli import session
from tnllm_export.cli.main import app
from tnllm_export.graphs.lowerings import LOWERINGS
from tnllm_export.targets import TARGETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
USAGE = 2
OTHER_CODES = {0, USAGE, session.EXIT_INTERNAL, session.EXIT_IO, session.EXIT_INTERRUPTED, session.EXIT_PIPE}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table(page: str, first_header: str) -> list[list[str]]:
    """Return the rows of the table whose first column has this header."""
    lines = text_of(page).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def family(kind: type[errors.TnllmError]) -> list[type[errors.TnllmError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in family(child))]


def families() -> list[type[errors.TnllmError]]:
    """The exceptions right below the base, those of this package only."""
    found = [kind for kind in errors.TnllmError.__subclasses__() if kind.__module__ == errors.__name__]
    assert len(found) > 5
    return found


def test_the_readmes_exit_codes_are_those_of_the_exceptions() -> None:
    rows = {codes: name.strip("`") for codes, name, _ in table("README.md", "code")}
    expected = {}
    for kind in families():
        codes = sorted({member.exit_code for member in family(kind)})
        expected[f"{codes[0]} – {codes[-1]}" if len(codes) > 1 else str(codes[0])] = kind.__name__
    assert rows == expected | {str(code): "" for code in OTHER_CODES}


def test_the_command_lines_page_tells_every_exit_code() -> None:
    rows = table("docs/cli.md", "code")
    told = {int(code) for row in rows for code in re.findall(r"\b\d{1,3}\b", " ".join(row))}
    needed = {member.exit_code for kind in families() for member in family(kind)} | OTHER_CODES
    assert sorted(needed - told) == []
    # A first column is a single code, several, or a range; no code of it is free.
    named = {int(code) for codes, *_ in rows for code in re.findall(r"\d+", codes)}
    assert sorted(named - needed) == []


def test_the_readmes_targets_are_those_of_the_code() -> None:
    rows = {name.strip("`"): (dtypes, lowerings) for name, dtypes, lowerings in table("README.md", "target")}
    assert list(rows) == [target.name for target in reversed(TARGETS)]
    for target in TARGETS:
        dtypes, lowerings = rows[target.name]
        assert dtypes == ", ".join(target.dtypes)
        if target.lowerings:
            assert lowerings == ", ".join(target.lowerings)
        else:
            assert lowerings.startswith("any")


def test_the_lowerings_page_has_every_lowering_with_its_opset() -> None:
    rows = {name.strip("`"): int(opset) for name, _, opset, _ in table("docs/graphs.md", "lowering")}
    assert rows == {name: lowering.opset for name, lowering in LOWERINGS.items()}


def test_newcomers_need_two_commands() -> None:
    section = text_of("README.md").split("## Try it")[1].split("## ")[0]
    assert re.findall(r"^    (\S.*?)(?:  |$)", section, re.MULTILINE) == ["make demo", "make test"]


def test_make_targets_that_are_told_exist() -> None:
    targets = set(re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE))
    told = {name for page in PAGES for name in re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8"))}
    assert {"demo", "test", "lint"} <= told <= targets


def test_commands_that_are_told_exist() -> None:
    commands = {command.name for command in app.registered_commands}
    told = {
        name
        for page in PAGES
        for name in re.findall(r"(?:`|^    |\$ )tnllm ([a-z][a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert "export" in told
    assert told <= commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_told_of_exist(page: Path) -> None:
    """Paths in backticks that begin with a folder of this repository."""
    folders = ("kernels/", "graphs/", "tnllm_export/", "tests/", "docs/", "examples/", "benchmarks/")
    for path in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
        if path.startswith(folders) and "NAME" not in path and not path.startswith("benchmarks/results"):
            assert (ROOT / path).exists(), path
