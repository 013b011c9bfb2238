"""What can't be built is said in one line, before anything is written."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from tnllm_export.api import EngineOptions, build
from tnllm_export.build.options import parse_compute_capabilities
from tnllm_export.build.timing_cache import load_timing_cache, save_timing_cache
from tnllm_export.errors import EngineBuildError, RuntimeMissingError, WriteError
from tnllm_export.targets import TARGETS

# Not importorskip: nothing imports TensorRT that does not use it.
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform")


def one_line(error):
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "max-batch is 0; expected 1 … 2147483647"),
        ({"max_batch": 1 << 31}, "max-batch is 2147483648; expected 1 … 2147483647"),
        ({"max_prompt": -3}, "max-prompt is -3; expected 1 …"),
        ({"max_batch": 4, "opt_batch": 5}, "opt-batch is 5; expected 1 … 4"),
        ({"max_prompt": 100, "opt_prompt": 0}, "opt-prompt is 0; expected 1 … 100"),
        ({"weights": "gone"}, "weights is 'gone'; expected one of: embedded, external, stripped"),
        ({"embed_plugin": True}, "no plugin library to embed"),
    ],
)
def test_options_that_fit_nothing_are_named(options, words):
    with pytest.raises(EngineBuildError) as error:
        EngineOptions(**options)
    assert words in one_line(error)


def test_compute_capabilities_are_read_in_both_spellings():
    assert parse_compute_capabilities(("120", "8.6", "86", "10.0", "7.5")) == ("7.5", "8.6", "10.0", "12.0")
    for text in ("sm_86", "8", "8.66", ""):
        with pytest.raises(EngineBuildError, match=r"is no compute capability; expected one like 8\.6 or 86"):
            parse_compute_capabilities((text,))


@needs_rtx
def test_a_gpu_that_tensorrt_rtx_does_not_know_is_named_with_the_way_out(exported):
    with pytest.raises(EngineBuildError) as error:
        build(exported("tiny", "float16", "matmul"), options=EngineOptions(compute_capabilities=("9.0", "8.6")))
    assert "does not build for compute capability 9.0; expected some of 7.5, 8.0, 8.6" in one_line(error)
    assert "--target tensorrt" in str(error.value)


@pytest.mark.parametrize(
    ("lowering", "options", "words"),
    [
        (
            "contrib",
            {},
            "lowering is contrib; tensorrt-rtx builds matmul or plugin: export again with --lowering matmul",
        ),
        ("plugin", {}, "no plugin library is named; make one with `tnllm build-plugin`"),
        ("plugin", {"plugin_library": "nothing.so"}, "nothing.so: no such file; make a plugin library"),
        ("matmul", {"plugin_library": "nothing.so"}, "lowering is matmul, which needs no plugin library"),
    ],
)
def test_a_bundle_that_does_not_fit_names_the_command_that_makes_one(exported, tmp_path, lowering, options, words):
    if "plugin_library" in options:
        options = {"plugin_library": tmp_path / options["plugin_library"]}
    with pytest.raises(EngineBuildError) as error:
        build(exported("tiny", "float16", lowering), options=EngineOptions(**options))
    assert words in one_line(error)


def test_an_unknown_target_is_named_beside_those_there_are(exported):
    with pytest.raises(EngineBuildError, match="target is 'openvino'; engines are built for: tensorrt-rtx, tensorrt"):
        build(exported("tiny", "float16", "matmul"), "openvino")


@pytest.mark.parametrize("target", [target for target in TARGETS if target.engine], ids=lambda target: target.name)
def test_without_tensorrt_one_line_names_the_extra(exported, monkeypatch, target):
    monkeypatch.setitem(sys.modules, target.engine.module, None)
    with pytest.raises(RuntimeMissingError) as error:
        build(exported("tiny", "float16", "matmul"), target.name)
    assert f"pip install 'tnllm-export[{target.engine.extra}]'" in one_line(error)


@needs_rtx
def test_a_tensorrt_that_strips_no_weights_is_named_with_what_works_instead(exported, monkeypatch):
    import tensorrt_rtx

    # What tensorrt_rtx 1.6 answers.
    monkeypatch.setattr(tensorrt_rtx.INetworkDefinition, "add_constant", lambda network, shape, weights: None)
    with pytest.raises(EngineBuildError) as error:
        build(exported("tiny", "float16", "matmul"), options=EngineOptions(weights="stripped"))
    assert f"tensorrt_rtx {tensorrt_rtx.__version__} takes no placeholder for model.layers.0" in one_line(error)
    assert "expected tensorrt_rtx 1.7 or later: install it, or" in one_line(error)
    assert "--weights external" in one_line(error)


def test_paths_may_be_strings():
    options = EngineOptions(plugin_library="library.so", timing_cache="times")
    assert (options.plugin_library, options.timing_cache) == (Path("library.so"), Path("times"))


def test_a_target_that_measures_nothing_takes_no_timing_cache(exported, tmp_path):
    with pytest.raises(EngineBuildError, match="tensorrt-rtx measures nothing while it builds; leave out --timing-cac"):
        build(exported("tiny", "float16", "matmul"), options=EngineOptions(timing_cache=tmp_path / "times"))


class Times:
    """What TensorRT does with timing caches: "bad" is none, and one "of another" GPU is refused."""

    def create_timing_cache(self, content):
        return None if content.startswith(b"bad") else SimpleNamespace(serialize=lambda: b"good" + content)

    def set_timing_cache(self, cache, *, ignore_mismatch):
        return ignore_mismatch or not bytes(cache.serialize()).endswith(b"of another")


@needs_rtx
def test_a_timing_cache_is_kept_or_named_with_what_is_wrong_with_it(tmp_path):
    import tensorrt_rtx

    path = tmp_path / "times"
    for content in (b"good", b"goodgood"):
        save_timing_cache(load_timing_cache(tensorrt_rtx, Times(), path), path)
        assert path.read_bytes() == content
    for content in (b"bad", b"of another"):
        path.write_bytes(content)
        with pytest.raises(EngineBuildError) as error:
            load_timing_cache(tensorrt_rtx, Times(), path)
        assert f"{path}: tensorrt_rtx {tensorrt_rtx.__version__} does not take this timing cache" in one_line(error)
        assert "delete it, or name another file" in one_line(error)
        assert path.read_bytes() == content
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(WriteError, match="link: is a symbolic link; expected a new file, or a timing cache to replace"):
        load_timing_cache(tensorrt_rtx, Times(), tmp_path / "link")
    with pytest.raises(WriteError, match="nowhere/times: could not be written"):
        load_timing_cache(tensorrt_rtx, Times(), tmp_path / "nowhere" / "times")


@needs_rtx
def test_a_graph_that_tensorrt_refuses_is_named_with_its_reason(bundle_of):
    import onnx

    bundle = bundle_of("tiny", "float16", "matmul")
    model = onnx.load(bundle.decode_path, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, bundle.decode_path)
    # The bundle is opened already: what is tested is TensorRT's refusal, not the checksum.
    with pytest.raises(EngineBuildError) as error:
        build(bundle, options=EngineOptions(max_batch=1, max_prompt=2))
    assert "decode.onnx: tensorrt_rtx" in one_line(error)
    assert "NoSuchOperator" in str(error.value) or "Plugin not found" in str(error.value)
    assert not list(bundle.path.glob("engines/*/*"))


@needs_rtx
def test_the_command_line_prints_one_document_for_an_error_and_for_a_build(exported, bundle_of):
    from typer.testing import CliRunner

    from tnllm_export.cli.main import app

    bad = CliRunner().invoke(app, ["build", str(exported("tiny", "float16", "matmul").path), "--sm", "9.0", "--json"])
    assert bad.exit_code == EngineBuildError.exit_code
    assert json.loads(bad.stdout)["error"]["type"] == "EngineBuildError"

    path = bundle_of("tiny", "float16", "matmul").path
    options = ["--max-batch", "2", "--max-prompt", "33", "--sm", "8.6,120"]
    good = CliRunner().invoke(app, ["build", str(path), *options, "--json"])
    document = json.loads(good.stdout)
    assert good.exit_code == 0
    assert document["cached"] is False
    assert document["spec"]["compute_capabilities"] == ["8.6", "12.0"]
    assert document["spec"]["profile"] == {"max_batch": 2, "opt_batch": 1, "max_prompt": 33, "opt_prompt": 33}
    assert {
        name: (path / "engines/tensorrt-rtx" / document["key"] / name).stat().st_size for name in document["files"]
    } == {name: record["bytes"] for name, record in document["files"].items()}
    text = CliRunner().invoke(app, ["build", str(path), *options])
    assert text.exit_code == 0
    assert "there already" in text.stdout


def test_importing_the_builder_imports_no_tensorrt():
    code = "import sys, tnllm_export.api; print(sorted({'tensorrt', 'tensorrt_rtx', 'onnx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
