"""Whatever is wrong with what a user brings: one line that names it, an exit code, and nothing changed on the disk.

Each case goes through the command line. What a message says in detail is tested where it is made.
"""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tnllm_export.bundle import MANIFEST, open_bundle
from tnllm_export.cli.progress import Silence

L1, L2 = "model.layers.1.channel_mixer.l1.weight", "model.layers.1.channel_mixer.l2.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Case:
    """What is spoiled, what is then asked for, and what must be said."""

    spoil: Callable[[Path], object]
    code: int
    words: tuple[str, ...]
    arguments: tuple[str, ...] = ()


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """On a slow machine, lines about progress would stand beside the error."""
    monkeypatch.setattr("tnllm_export.cli.session.choose_display", lambda *_: Silence())


def snapshot(folder):
    """Return all that is below a folder: names, kinds and content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def check(result, code, words):
    assert (result.exit_code, result.stdout) == (code, "")
    # `splitlines` knows more line ends than "\n".
    assert len(result.stderr.splitlines()) == 1
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    for word in words:
        assert word in result.stderr


# Checkpoints. A spoiler is given a good one of its own.


def edit_config(**fields):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def edit_weights(**changes):
    """Put tensors in, or take them out where they are None; a dot in a name is written `__`."""

    def spoil(folder):
        named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        weights = load_file(folder / "model.safetensors") | named
        kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")

    return spoil


def renamed(name):
    return name.replace(".", "__")


def shorten(path, size=1000):
    path.write_bytes(path.read_bytes()[:-size])


def shard(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    owner = {name: SHARDS[index % 2] for index, name in enumerate(names)}
    for file in SHARDS:
        save_file({name: weights[name] for name in names if owner[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    (folder / "model.safetensors").unlink()


def truncate_shard(folder):
    shard(folder)
    shorten(folder / SHARDS[1])


def lose_shard(folder):
    shard(folder)
    (folder / SHARDS[1]).unlink()


def pickle_weights(folder, **more):
    torch.save({**load_file(folder / "model.safetensors"), **more}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate_bin(folder):
    pickle_weights(folder)
    shorten(folder / "pytorch_model.bin")


class Foreign:
    """An object that makes a file beside its checkpoint when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder.parent / "was-run"),)


def spoil_value(value):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        weights[L1][2, 3] = value
        save_file(weights, folder / "model.safetensors")

    return spoil


def grow_vocabulary(folder):
    edit_config(vocab_size=400)(folder)
    edit_weights(model__embed_tokens__weight=torch.zeros(400, 48))(folder)


CHECKPOINTS = {
    "no such folder": Case(shutil.rmtree, 11, ("no such folder", "config.json")),
    "empty folder": Case(lambda folder: [path.unlink() for path in folder.iterdir()], 11, ("no config.json",)),
    "no weights": Case(lambda folder: (folder / "model.safetensors").unlink(), 11, ("no weights", "pytorch_model.bin")),
    "broken JSON": Case(
        lambda folder: shorten(folder / "config.json", 2), 12, ("config.json", "broken JSON", "restore the file")
    ),
    "unknown norm": Case(edit_config(norm_type="batchnorm"), 12, ("norm_type", "'batchnorm'", "'rmsnorm'", "correct")),
    "unknown activation": Case(edit_config(linear_act_fun="gelu"), 12, ("linear_act_fun", "'gelu'", "'silu'")),
    "heads that do not divide": Case(
        edit_config(decoder_attention_heads=5), 12, ("decoder_attention_heads 5", "decoder_embed_dim 48", "correct")
    ),
    "missing tensor": Case(edit_weights(**{renamed(L1): None}), 13, (f"missing: {L1};",)),
    "extra tensor": Case(edit_weights(a__stranger=torch.zeros(3)), 13, ("extra: a.stranger;",)),
    "mis-shaped tensor": Case(
        edit_weights(**{renamed(L1): torch.zeros(64, 40)}), 13, (f"mis-shaped: {L1} [64, 40] (expected [64, 48])",)
    ),
    "all three": Case(
        edit_weights(**{renamed(L1): None, renamed(L2): torch.zeros(64, 40), "stranger": torch.zeros(3)}),
        13,
        (f"missing: {L1};", "extra: stranger;", f"mis-shaped: {L2}", "correct config.json or the weights"),
    ),
    "truncated shard": Case(truncate_shard, 14, (SHARDS[1], "download the file again")),
    "absent shard": Case(lose_shard, 11, (SHARDS[1], "no such file", "fetch it")),
    "truncated bin": Case(truncate_bin, 14, ("pytorch_model.bin", "truncated", "download the file again")),
    "pickle with foreign objects": Case(
        lambda folder: pickle_weights(folder, extra=Foreign(folder)),
        15,
        ("pytorch_model.bin", "posix.mkdir", "convert"),
    ),
    "NaN weights": Case(spoil_value(float("nan")), 16, (L1, "NaN", "expected finite")),
    "infinite weights": Case(spoil_value(float("inf")), 16, (L1, "infinite", "expected finite")),
    "weights too large for the dtype": Case(
        spoil_value(1e6), 16, (L1, "1e+06", "65504", "bfloat16"), ("--dtype", "float16")
    ),
    "tokenizer of another vocabulary": Case(grow_vocabulary, 17, ("tokenizer.model", "320", "400")),
    "broken tokenizer": Case(
        lambda folder: (folder / "tokenizer.model").write_bytes(b"\xff" * 9), 17, ("tokenizer.model", "SentencePiece")
    ),
    "something at the output": Case(
        lambda folder: (folder.parent / "out").write_text("mine"), 22, ("out: exists already", "choose another path")
    ),
    "no bundle to overwrite": Case(
        lambda folder: (folder.parent / "out").mkdir(), 22, ("out: is no bundle", "choose another"), ("--overwrite",)
    ),
    "output below a file": Case(
        lambda folder: (folder.parent / "file").touch(), 31, ("a part of the path is a file",), ("-o", "{tmp}/file/out")
    ),
}


@pytest.fixture
def checkpoint(text_checkpoint, tmp_path):
    return Path(shutil.copytree(text_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints_are_refused_and_nothing_is_written(tnllm, checkpoint, tmp_path, name):
    case = CHECKPOINTS[name]
    case.spoil(checkpoint)
    before = snapshot(tmp_path)
    more = [argument.format(tmp=tmp_path) for argument in case.arguments]
    check(tnllm("export", checkpoint, "-o", tmp_path / "out", *more), case.code, case.words)
    assert snapshot(tmp_path) == before


@contextmanager
def file_size_limit(size):
    """Let the system refuse larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_leaves_what_was_there(tnllm, checkpoint, text_bundle, tmp_path, overwrite):
    if overwrite:
        shutil.copytree(text_bundle.path, tmp_path / "out")
    before = snapshot(tmp_path)
    with file_size_limit(20_000):
        result = tnllm("export", checkpoint, "-o", tmp_path / "out", "--overwrite")
    check(result, 31, ("out: could not be written", "ulimit -f"))
    assert snapshot(tmp_path) == before


def test_a_state_that_can_not_be_saved_leaves_the_old_one(tnllm, text_bundle, tmp_path):
    arguments = ("generate", text_bundle.path, "--prompt", "He", "--max-new-tokens", 1, "--save-state", tmp_path / "s")
    assert tnllm(*arguments).exit_code == 0
    before = snapshot(tmp_path)
    with file_size_limit(1000):
        result = tnllm(*arguments)
    assert result.exit_code == 31
    assert re.fullmatch(r"error: [^\n]*/s: could not be written[^\n]*\n", result.stderr)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["notes.txt", "bundle/weights.safetensors", "bundle/new", "-", "link"])
@pytest.mark.parametrize("verb", ["generate", "bench"])
def test_only_a_file_of_the_verbs_own_is_replaced_and_all_else_is_refused_before_the_work(
    tnllm, bundle, tmp_path, monkeypatch, verb, place
):
    def loading(*arguments, **options):
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tnllm_export.api.generator", loading)
    monkeypatch.setattr("tnllm_export.bench.bench_bundle", loading)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    before = snapshot(tmp_path)
    options = {"generate": ("--prompt", "He", "--save-state"), "bench": ("-o",)}[verb]
    check(tnllm(verb, bundle, *options, place), 31, (f"{place}: ", "choose another path"))
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_killed_export_is_never_taken_for_a_bundle_and_the_next_one_works(tnllm, checkpoint, tmp_path):
    place = tmp_path / "place"
    code = "from tnllm_export.cli.main import main; main()"
    command = [sys.executable, "-c", code, "export", checkpoint, "-o", place / "out"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not list(place.glob(".out.partial-*/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    [partial] = place.iterdir()
    for path in (place / "out", partial):
        assert tnllm("generate", path, "--prompt", "He").exit_code == 21
    again = tnllm("export", checkpoint, "-o", place / "out", "--json")
    assert again.exit_code == 0, again.stderr
    assert [path.name for path in place.iterdir()] == ["out"]
    assert open_bundle(place / "out").manifest.source.checkpoint == "checkpoint"


# Bundles. A spoiler is given a good one of its own.


def edit_manifest(**fields):
    """Change fields, and the manifest's checksum of itself with them."""

    def spoil(folder):
        path = folder / MANIFEST
        found = json.loads(path.read_text()) | fields
        del found["manifest_sha256"]
        text = json.dumps(found, sort_keys=True, separators=(",", ":"))
        path.write_text(json.dumps(found | {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))

    return spoil


def flip(name):
    def spoil(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def drop_tokenizer(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    del files["tokenizer.model"]
    edit_manifest(tokenizer=None, files=files)(folder)
    (folder / "tokenizer.model").unlink()


def leave_alone(folder):
    assert open_bundle(folder)


PROMPT = ("generate", "{bundle}", "--prompt", "He")
IDS = ("generate", "{bundle}", "--prompt-ids")
VERIFY = ("verify", "{bundle}")

BUNDLES = {
    "no such bundle": Case(shutil.rmtree, 21, ("bundle: no such folder", "tnllm export"), PROMPT),
    "no manifest": Case(lambda folder: (folder / MANIFEST).unlink(), 21, ("no manifest.json", "tnllm export"), PROMPT),
    "flipped byte of the weights": Case(flip("weights.safetensors"), 23, ("weights.safetensors", "again"), PROMPT),
    "flipped byte, verified": Case(flip("weights.safetensors"), 23, ("weights.safetensors", "checksum"), VERIFY),
    "flipped byte of a graph": Case(flip("decode.onnx"), 23, ("decode.onnx", "checksum"), PROMPT),
    "flipped byte of the manifest": Case(flip(MANIFEST), 23, (MANIFEST, "again"), PROMPT),
    "missing file": Case(lambda folder: (folder / "decode.onnx").unlink(), 23, ("decode.onnx: missing",), PROMPT),
    "newer manifest": Case(edit_manifest(schema_version=2), 24, ("schema_version is 2", "upgrade"), PROMPT),
    "newer manifest, inspected": Case(edit_manifest(schema_version=2), 24, ("upgrade",), ("inspect", "{bundle}")),
    "manifest that leads out": Case(
        edit_manifest(tokenizer="../checkpoint/tokenizer.model"), 23, ("'../checkpoint/tokenizer.model'",), PROMPT
    ),
    "dtype that the runtime lacks": Case(
        edit_manifest(dtype="bfloat16"), 42, ("dtype is bfloat16", "--dtype float32", "runtime torch"), PROMPT
    ),
    "device that the runtime lacks": Case(
        leave_alone,
        42,
        ("tensorrt-rtx does not run on device 'cpu'; expected one of: cuda",),
        (*PROMPT, "--runtime", "tensorrt-rtx", "--device", "cpu"),
    ),
    "lowering that the runtime lacks": Case(
        edit_manifest(lowering="standard"), 42, ("lowering is standard", "--lowering", "runtime torch"), VERIFY
    ),
    "text without a tokenizer": Case(drop_tokenizer, 52, ("no tokenizer", "token ids instead"), PROMPT),
    "empty prompt": Case(leave_alone, 51, ("prompt 0 is empty",), ("generate", "{bundle}", "--prompt", "")),
    "no token ids": Case(leave_alone, 51, ("prompt 0 is empty",), (*IDS, "")),
    "prompt above the limit": Case(
        leave_alone, 51, ("prompt 0 has 3 tokens", "at most 2", "shorten"), (*IDS, "5,6,7", "--prompt-limit", "2")
    ),
    "token id out of range": Case(leave_alone, 51, ("token id 320", "0 … 319"), (*IDS, "5,320")),
    "negative token id": Case(leave_alone, 51, ("token id -1",), (*IDS, "5,-1")),
    "prompt that is no text": Case(
        leave_alone, 51, ("prompt 0 is no UTF-8", "convert"), ("generate", "{bundle}", "--prompt", "ab\udcff")
    ),
}


@pytest.fixture
def bundle(text_bundle, tmp_path):
    return Path(shutil.copytree(text_bundle.path, tmp_path / "bundle"))


@pytest.mark.parametrize("name", BUNDLES)
def test_bad_bundles_and_requests_are_refused_and_nothing_changes(tnllm, bundle, tmp_path, name):
    case = BUNDLES[name]
    case.spoil(bundle)
    before = snapshot(tmp_path)
    check(tnllm(*(argument.format(bundle=bundle) for argument in case.arguments)), case.code, case.words)
    assert snapshot(tmp_path) == before


def test_a_bundle_that_can_not_take_its_report_is_told_before_the_work(tnllm, bundle, tmp_path, monkeypatch):
    # Not by permissions: they don't hold for root.
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode, **more: mode != os.W_OK and allowed(path, mode, **more))
    before = snapshot(tmp_path)
    check(tnllm("verify", bundle), 31, ("bundle: no permission", "--no-save"))
    assert snapshot(tmp_path) == before


def reshape_state(path):
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, "state.1": torch.zeros(1, 3, 16, 8)}, path, metadata)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (reshape_state, ("state of layer 1 has shape [1, 3, 16, 8]", "expected [1, 3, 16, 16]", "the same model")),
        (shorten, ("not a readable state file", "write it again")),
        (Path.unlink, ("no such file",)),
    ],
    ids=["wrong shape", "truncated", "absent"],
)
def test_bad_states_are_refused_and_nothing_changes(tnllm, bundle, tmp_path, spoil, words):
    state = tmp_path / "state"
    made = tnllm("generate", bundle, "--prompt", "He", "--max-new-tokens", 1, "--save-state", state)
    assert made.exit_code == 0, made.stderr
    spoil(state)
    before = snapshot(tmp_path)
    check(tnllm("generate", bundle, "--load-state", state), 54, ("/state: ", *words))
    assert snapshot(tmp_path) == before


def test_a_checkpoint_without_a_tokenizer_exports_with_one_warning(tnllm, checkpoint, tmp_path):
    (checkpoint / "tokenizer.model").unlink()
    result = tnllm("export", checkpoint, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(r"warning: [^\n]*checkpoint: no tokenizer[^\n]*--prompt-ids[^\n]*\n", result.stderr)
    assert json.loads(result.stdout)["tokenizer"] is None


def test_what_was_measured_is_shown_even_where_it_can_not_be_saved(tnllm, bundle, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tnllm_export.bundle.files.replace", full)
    before = snapshot(bundle)
    result = tnllm("verify", bundle, "--json")
    assert result.exit_code == 31
    document = json.loads(result.stdout)
    assert document["passed"]
    assert "the disk is full" in document["error"]["message"]
    assert snapshot(bundle) == before
