"""`build-plugin`: from compute capabilities to a library, with the kernels' compiler in the place of a fake."""

import json

import pytest
from typer.testing import CliRunner

from tests.plugins.fake import fake_table
from tnllm_export.cli.main import app
from tnllm_export.errors import PluginBuildError, WriteError
from tnllm_export.plugins.build import PluginOptions


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Compile nothing; return what was asked for."""
    calls = []

    def compile_table(capabilities, head_sizes, dtypes, *, progress):
        calls.append((tuple(capabilities), tuple(head_sizes), tuple(dtypes)))
        return fake_table()

    monkeypatch.setattr("tnllm_export.plugins.build.compile_table", compile_table)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def invoke(*arguments):
    return CliRunner().invoke(app, ["build-plugin", *map(str, arguments)])


def test_a_library_is_made_for_the_gpus_that_are_named(asked, tmp_path):
    result = invoke("--sm", "8.6,120", "-o", tmp_path / "out" / "plugins.so", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["library"] == str(tmp_path / "out" / "plugins.so")
    assert (tmp_path / "out" / "plugins.so").stat().st_size == document["bytes"] > 10_000
    assert asked == [((86, 120), ((256, 128), (128, 128)), ("float32", "float16", "bfloat16"))]
    # Without a place it stays in the cache, and the second one is the first.
    first, second = invoke("--sm", "8.6"), invoke("--sm", "8.6")
    assert first.stdout.split(":")[0] == second.stdout.split(":")[0]
    assert str(tmp_path / "cache" / "tnllm") in first.stdout


def test_a_bundle_tells_its_head_sizes_and_dtype(asked, text_bundle):
    assert invoke("--sm", "90", "--bundle", text_bundle.path).exit_code == 0
    assert asked == [((90,), ((16, 16), (32, 16)), ("float32",))]


def test_what_cannot_be_compiled_is_told_in_one_line(asked):
    for arguments, words in (
        (["--sm", "9.1"], "kernels can't be compiled for 91; expected some of 80, 86"),
        (["--sm", "hopper"], "'hopper' is no compute capability"),
        (["--include", "/nowhere"], "/nowhere: no NvInferRuntime.h; name their folder with --include"),
    ):
        result = invoke(*arguments)
        assert result.exit_code in (33, 34)
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert asked == []
    with pytest.raises(PluginBuildError, match="head size is 24x16"):
        PluginOptions(head_sizes=((24, 16),))


def test_without_triton_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr("tnllm_export.kernels.compile.find_spec", lambda name: None)
    result = invoke("--sm", "86")
    assert result.exit_code == PluginBuildError.exit_code
    assert "pip install 'tnllm-export[triton]'" in result.stderr


def test_only_an_earlier_library_is_replaced(asked, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("keep me")
    result = invoke("--sm", "8.6", "-o", notes)
    assert result.exit_code == WriteError.exit_code
    assert "exists already and is not a plugin library" in " ".join(result.stderr.split())
    assert notes.read_text() == "keep me"
    assert not asked
    for _ in range(2):
        assert invoke("--sm", "8.6", "-o", tmp_path / "plugins.so").exit_code == 0
