"""One line, one exit code, whatever goes wrong."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tnllm_export.errors import TnllmWarning

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "scaled_embedding"

CASES = {
    "no such checkpoint": (("export", "{tmp}/none", "-o", "{tmp}/b"), 11, "no such folder"),
    "output exists": (("export", "{checkpoint}", "-o", "{bundle}"), 22, "--overwrite"),
    "no such bundle": (("verify", "{tmp}/none"), 21, "no such folder"),
    "no bundle": (("generate", "{tmp}", "--prompt", "x"), 21, "no manifest.json"),
    "empty prompt": (("generate", "{bundle}", "--prompt", ""), 51, "prompt 0 is empty"),
    "long prompt": (("generate", "{bundle}", "--prompt-ids", "1,2,3", "--prompt-limit", "2"), 51, "at most 2"),
    "ids that are none": (("generate", "{bundle}", "--prompt-ids", "1,x"), 51, "'x'; expected integers"),
    "id out of range": (("generate", "{bundle}", "--prompt-ids", "1,320"), 51, "token id 320"),
    "prompt file that is no text": (("generate", "{bundle}", "--prompt-file", "{binary}"), 51, "not UTF-8"),
    "prompt file that is missing": (("generate", "{bundle}", "--prompt-file", "{tmp}/none"), 74, "No such file"),
    "text without a tokenizer": (("generate", "{ids}", "--prompt", "x"), 52, "no tokenizer"),
    "stop text without a tokenizer": (("generate", "{ids}", "--prompt-ids", "1", "--stop", "x"), 52, "no tokenizer"),
    "verifying on text without a tokenizer": (("verify", "{ids}", "--text-file", "{short}"), 52, "no tokenizer"),
    "another checkpoint": (("verify", "{bundle}", "--checkpoint", "{golden}"), 42, "another configuration"),
    "sampling": (("generate", "{bundle}", "--prompt", "x", "--top-p", "2"), 53, "top_p is 2.0"),
    "state file": (("generate", "{bundle}", "--load-state", "{binary}"), 54, "not a readable state file"),
    "graph": (("inspect", "{binary}"), 23, "no ONNX file"),
    "graph by another name": (("inspect", "{checkpoint}/config.json"), 23, "no ONNX file"),
    "nothing to inspect": (("inspect", "{tmp}/none.onnx"), 21, "no such file"),
    "numbers that are none": (("bench", "{bundle}", "--contexts", "1,x"), 50, "--contexts is '1,x'; expected integers"),
    "prompts of no length": (("bench", "{bundle}", "--prompt-lengths", "0"), 50, "prompt_lengths is [0]"),
    "no time": (("bench", "{bundle}", "--time-limit", "0"), 50, "time_limit is 0"),
    "all the time": (("bench", "{bundle}", "--time-limit", "inf"), 50, "time_limit is inf"),
    "more sequences than there are numbers": (
        ("bench", "{bundle}", "--batches", "1,9999999999"),
        50,
        "1 to 2147483647",
    ),
    "bundle in a bundle": (("export", "{checkpoint}", "-o", "{bundle}/b"), 22, "lies in the bundle"),
    "long name": (("export", "{checkpoint}", "-o", "{tmp}/" + "a" * 300), 31, "the name is too long"),
    "page in no folder": (("bench", "{bundle}", "-o", "{tmp}/none/page.html"), 31, "can't be written"),
    "empty text": (("verify", "{bundle}", "--text-file", "{empty}"), 51, "has 0 tokens; expected at least 8"),
    "many threads": (
        ("generate", "{bundle}", "--prompt", "x", "--threads", "100000"),
        50,
        "threads is 100000; expected",
    ),
    "many threads to verify with": (("verify", "{bundle}", "--threads", "100000"), 50, "threads is 100000; expected"),
    "many threads to time": (("bench", "{bundle}", "--threads", "100000"), 50, "threads is 100000; expected"),
    "device to train on": (("train-demo", "-o", "{tmp}/td", "--device", "abacus"), 42, "device is 'abacus'"),
    "short text": (("verify", "{bundle}", "--text-file", "{short}"), 51, "expected at least 8"),
}


@pytest.fixture
def places(tmp_path, text_checkpoint, text_bundle, ids_bundle):
    binary, short = tmp_path / "binary", tmp_path / "short"
    binary.write_bytes(bytes(range(200, 256)))
    short.write_text("Oh")
    (tmp_path / "empty").touch()
    return {
        "tmp": tmp_path,
        "checkpoint": text_checkpoint,
        "bundle": text_bundle.path,
        "ids": ids_bundle.path,
        "golden": GOLDEN,
        "binary": binary,
        "short": short,
        "empty": tmp_path / "empty",
    }


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_line_and_its_exit_code(tnllm, places, case):
    arguments, code, words = CASES[case]
    arguments = [argument.format(**places) for argument in arguments]
    result = tnllm(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert words in result.stderr

    as_json = tnllm(*arguments, "--json")
    assert as_json.exit_code == code
    error = json.loads(as_json.stdout)["error"]
    assert error["exit_code"] == code
    assert f"error: {error['message']}\n" == as_json.stderr


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ("abacus", "TNLLM_KERNELS: found 'abacus'; expected one of auto, triton, pytorch: correct it or unset it"),
        ("triton", "can't run on cpu here; expected a CUDA device and the package triton"),
    ],
)
@pytest.mark.parametrize(
    "arguments", [("generate", "--runtime", "torch", "--prompt", "He"), ("verify",), ("verify", "--runtime", "torch")]
)
def test_kernels_that_can_not_run_are_the_users_setting_and_no_bug(
    tnllm, text_bundle, monkeypatch, arguments, kernels, words
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TNLLM_KERNELS", kernels)
    result = tnllm(*arguments, text_bundle.path)
    assert (result.exit_code, result.stdout) == (42, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert words in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("translate",),
        ("export", "x"),
        ("export", "x", "-o", "y", "--lowering", "loop"),
        ("export", "x", "-o", "y", "--dtype", "int8"),
        ("generate", "x"),
        ("generate", "x", "--prompt", "a", "--prompt", "b", "--save-state", "s"),
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_wrong_usage_exits_with_2(tnllm, arguments):
    result = tnllm(*arguments)
    assert result.exit_code == 2
    assert "Usage: tnllm" in result.stderr or "Usage: tnllm" in result.stdout


def raising(monkeypatch, error):
    def inspect(path):
        raise error

    monkeypatch.setattr("tnllm_export.api.inspect", inspect)


def test_a_bug_is_one_line_that_asks_for_a_report(tnllm, monkeypatch):
    raising(monkeypatch, ZeroDivisionError("division\nby zero"))
    result = tnllm("inspect", "x")
    assert result.exit_code == 70
    assert re.fullmatch(
        r"internal error: ZeroDivisionError: division by zero; [^\n]*TNLLM_DEBUG=1[^\n]*\n", result.stderr
    )
    monkeypatch.setenv("TNLLM_DEBUG", "1")
    debugged = tnllm("inspect", "x")
    assert debugged.exit_code == 70
    assert "Traceback (most recent call last)" in debugged.stderr


def test_ctrl_c_exits_with_130(tnllm, monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    result = tnllm("inspect", "x")
    assert (result.exit_code, result.stderr) == (130, "interrupted: nothing was left half-written\n")
    assert json.loads(tnllm("inspect", "x", "--json").stdout)["error"]["exit_code"] == 130


def test_a_failing_stream_is_no_bug(tnllm, monkeypatch):
    raising(monkeypatch, OSError(5, "Input/output error"))
    result = tnllm("inspect", "x")
    assert result.exit_code == 74
    assert re.fullmatch(r"error: Input/output error; [^\n]+\n", result.stderr)


def test_a_missing_prompt_is_told_in_json_too(tnllm):
    result = tnllm("generate", "x", "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"]) == (2, 2)
    assert "--prompt-ids" in error["message"]


def test_warnings_are_lines_said_once(tnllm, monkeypatch):
    def inspect(path):
        for _ in range(2):
            warnings.warn("ignored\nthis", TnllmWarning, stacklevel=1)
            warnings.warn("somebody else's", UserWarning, stacklevel=1)
        raise SystemExit(0)

    monkeypatch.setattr("tnllm_export.api.inspect", inspect)
    assert tnllm("inspect", "x").stderr == "warning: ignored this\n"


def run(*arguments, **options):
    command = [sys.executable, "-c", "from tnllm_export.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_a_real_process_reports_and_exits(tmp_path):
    failed = run("inspect", tmp_path / "none", "--json")
    assert failed.returncode == 21
    assert json.loads(failed.stdout)["error"]["type"] == "BundleNotFoundError"
    version = run("--version")
    assert version.returncode == 0
    assert re.fullmatch(r"tnllm-export \d+\.\d+\.\d+\S*\n", version.stdout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_output_to_a_full_disk_is_one_line(text_bundle, options):
    command = [sys.executable, "-c", "from tnllm_export.cli.main import main; main()", "inspect", text_bundle.path]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, *options], stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == 74
    assert re.fullmatch(rb"error: No space left on device; [^\n]+\n", done.stderr)


def test_a_path_that_is_no_text_is_named_all_the_same():
    failed = run("inspect", os.fsdecode(b"/none-\xff"), "--json")
    assert failed.returncode == 21
    assert "none-" in json.loads(failed.stdout)["error"]["message"]
    assert failed.stderr.startswith("error: /none-")


def test_a_reader_who_goes_away_is_no_error(text_bundle):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from tnllm_export.cli.main import main; main()", "inspect", text_bundle.path]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


COMMAND = [sys.executable, "-c", "from tnllm_export.cli.main import main; main()"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), (), ("generate", "--help")], ids=" ".join)
def test_help_to_a_full_disk_is_one_line_too(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
        muted = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=full, timeout=120, check=False)
    assert (done.returncode, muted.returncode) == (74, 74)
    assert re.fullmatch(rb"error: No space left on device; [^\n]+\n", done.stderr)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), (), ("generate", "--help")], ids=" ".join)
def test_a_reader_of_the_help_who_goes_away_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("verb", ["demo", "export", "verify", "generate", "inspect", "train-demo"])
def test_every_verb_has_help_with_examples_and_json(tnllm, verb):
    result = tnllm(verb, "--help", env={"COLUMNS": "120", "TERMINAL_WIDTH": "120"})
    assert result.exit_code == 0
    assert f"tnllm {verb}" in result.stdout.split("Examples")[1]
    assert "--json" in result.stdout


def test_shell_completion_can_be_installed(tnllm):
    assert "--install-completion" in tnllm("--help").stdout
