"""What the README, the docs and the examples give people to copy runs on the demo checkpoint, and does as they say."""

import ast
import contextlib
import io
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tnllm_export import api
from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.demo import checkpoint_folder
from tnllm_export.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROMPT = "It was a fine morning in May, and"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_block(code: str, name: str, variables: dict[str, object]) -> str:
    """Run code as a user would paste it; return what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, name, "exec"), variables)
    return output.getvalue()


@pytest.fixture(scope="session")
def readme_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    """The README's API example, run in an empty folder: the bundle that it made, and what it printed."""
    folder = tmp_path_factory.mktemp("readme")
    [block] = python_blocks("README.md")
    with contextlib.chdir(folder):
        printed = run_block(block, "README.md", {})
    return open_bundle(folder / "bundle"), printed


@pytest.fixture(scope="session")
def bundle(readme_run: tuple[Bundle, str]) -> Bundle:
    return readme_run[0]


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_readmes_example_exports_verifies_and_writes_words(readme_run: tuple[Bundle, str]) -> None:
    bundle, printed = readme_run
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["passed"] is True
    assert len(re.findall(r"[A-Za-z]{3,}", printed)) > 20


def test_the_readmes_example_makes_five_calls_and_is_the_file_of_that_name() -> None:
    [block] = python_blocks("README.md")
    calls = block.split("\n\n", 1)[1].strip().splitlines()
    assert [name for line in calls for name in re.findall(r"api\.(\w+)\(", line)] == [
        "load",
        "export",
        "verify",
        "load_runtime",
        "generate",
    ]
    assert len(calls) == 5
    docstring, code = (EXAMPLES / "five_lines.py").read_text(encoding="utf-8").split("\n\n", 1)
    assert docstring.startswith('"""')
    assert code == block


def test_every_example_has_a_test() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    examples = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert examples
    assert [name for name in examples if f'"{name}"' not in here] == []


def test_streaming_prints_each_token_and_both_texts(run_example, bundle: Bundle) -> None:
    lines = run_example("streaming.py", bundle.path)
    events = re.findall(r"^([01]) +(\d+) (['\"].*)$", lines, re.MULTILINE)
    assert len(events) > 20
    texts = dict(re.findall(r"^([01]) ended \((?:length|eos)\): (.*)", lines, re.MULTILINE))
    assert texts["0"].startswith("Elizabeth had never in her life")
    assert texts["1"].startswith("The next morning")
    first_words = "".join(ast.literal_eval(piece) for index, _, piece in events if index == "0")[:20]
    assert first_words.strip()
    assert texts["0"].startswith("Elizabeth had never in her life" + first_words.splitlines()[0])


def test_continuing_later_gives_the_uninterrupted_text(run_example, bundle: Bundle, tmp_path: Path) -> None:
    state = tmp_path / "chapter.state"
    printed = run_example("continue_later.py", bundle.path, state)
    assert int(re.search(r"read (\d+) tokens", printed)[1]) > 256  # several pieces
    assert printed.endswith("same as uninterrupted: True\n")
    with safe_open(state, framework="pt") as file:
        assert file.get_slice("state.0").get_shape()[0] == 1


@pytest.mark.parametrize("lowering", ["matmul", "contrib"])
def test_plain_onnxruntime_writes_what_the_generator_writes(
    run_example, bundle: Bundle, tmp_path: Path, lowering: str
) -> None:
    if bundle.manifest.lowering != lowering:
        bundle = api.export(checkpoint_folder(), tmp_path / "bundle", lowering=lowering, logits="all")
    printed = run_example("plain_onnxruntime.py", bundle.path)
    done = api.generate(bundle, PROMPT, max_new_tokens=24)
    tokenizer = load_tokenizer(bundle.tokenizer_path, bundle.manifest.config.vocab_size)
    assert printed.strip() == tokenizer.decode([*done.prompt_ids, *done.token_ids]).strip()


def test_plain_onnxruntime_does_not_need_this_package(bundle: Bundle) -> None:
    script = "import runpy, sys; runpy.run_path(sys.argv[0]); print('LOADED', *sorted(sys.modules))"
    code = f"import sys; sys.argv = {[str(EXAMPLES / 'plain_onnxruntime.py'), str(bundle.path), 'Oh']!r}\n{script}"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    text, modules = printed.split("LOADED")
    assert text.startswith("Oh")
    assert {"onnxruntime", "sentencepiece"} <= set(modules.split())
    assert {"tnllm_export", "torch"} & set(modules.split()) == set()


@pytest.mark.parametrize("page", ["docs/generation.md", "docs/bundle.md"])
def test_the_python_of_the_docs_runs(page: str, bundle: Bundle, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(bundle.path, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page)
    assert blocks
    variables: dict[str, object] = {}
    printed = "".join(run_block(code, f"{page}, block {place}", variables) for place, code in enumerate(blocks, 1))
    assert printed.strip()
