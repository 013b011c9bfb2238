"""Real TensorRT-RTX engines around our own plugins, built without a GPU."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest

from tnllm_export.build import EngineOptions, build_engines
from tnllm_export.build.engine import make_builder
from tnllm_export.build.network import add_profile, make_weights_inputs, parse_network, read_graph
from tnllm_export.errors import EngineBuildError
from tnllm_export.tensorrt import engine_target, import_tensorrt, last_error, load_plugins

# Not importorskip: nothing imports TensorRT that does not use it.
pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform")

RTX = "tensorrt-rtx"
SMALL = EngineOptions(max_batch=3, max_prompt=65, opt_prompt=63)


def test_a_library_without_the_kernels_is_refused_before_the_build(bundle_of, library, tmp_path):
    bundle = bundle_of("tiny", "float16", "plugin")
    options = replace(SMALL, plugin_library=library, compute_capabilities=("8.6", "9.0"))
    with pytest.raises(EngineBuildError, match=r"has no kernels for compute capability 9\.0 with float16 heads of"):
        build_engines(bundle, RTX, options)
    other = tmp_path / "other.so"
    other.write_bytes(library.read_bytes().replace(b" float16 ", b" float61 "))
    with pytest.raises(EngineBuildError, match=r"no kernels for any GPU .* make the library again with `tnllm"):
        build_engines(bundle, RTX, replace(SMALL, plugin_library=other))
    assert not (bundle.path / "engines").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_demo_checkpoint_has_one_plugin_layer_per_model_layer_and_no_function_bodies(bundle_of, library, dtype):
    bundle = bundle_of("demo", dtype, "plugin")
    layers = bundle.manifest.config.decoder_layers
    trt = import_tensorrt(engine_target(RTX))
    load_plugins(trt, library)
    for graph, name in ((bundle.prefill_path, "LightningAttention"), (bundle.decode_path, "LightningAttentionStep")):
        assert [function.name for function in onnx.load(graph, load_external_data=False).functions] == [name]
        model = read_graph(graph)
        assert not model.functions
        network = parse_network(trt, make_builder(trt), model, graph)
        kinds = [network.get_layer(place).type for place in range(network.num_layers)]
        assert kinds.count(trt.LayerType.PLUGIN_V3) == layers
        # What the function bodies are made of is gone.
        assert trt.LayerType.CUMULATIVE not in kinds
        body_size = len(onnx.load(graph, load_external_data=False).functions[0].node)
        assert network.num_layers < layers * (body_size + 60)

    bare = build_engines(bundle, RTX, EngineOptions(max_batch=4, max_prompt=128, plugin_library=library))
    carrying = EngineOptions(max_batch=4, max_prompt=128, plugin_library=library, embed_plugin=True)
    embedded = build_engines(bundle, RTX, carrying)
    assert not bare.cached
    assert not embedded.cached
    for program in ("prefill", "decode"):
        assert len(bare.engines.file(program).read_bytes()) > bundle.weights_path.stat().st_size
        more = embedded.engines.file(program).stat().st_size - bare.engines.file(program).stat().st_size
        assert 0 <= more - library.stat().st_size < 4096
        assert b"getCreators" in embedded.engines.file(program).read_bytes()
    assert build_engines(bundle, RTX, carrying).cached
    assert embedded.engines.spec.plugin == replace_embedded(bare.engines.spec.plugin)


def replace_embedded(record):
    return record.model_copy(update={"embedded": True})


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: TensorRT's plugins are registered once and for all."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


BUILD = """
import sys
from pathlib import Path
# FIRST
from tnllm_export.api import EngineOptions, TnllmError, build
options = EngineOptions(max_batch=2, max_prompt=9, plugin_library=Path(sys.argv[2]))
try:
    print(build(sys.argv[1], options=options).engines.path)
except TnllmError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_a_plugin_build_survives_a_library_folder_that_it_cannot_write(exported, bundle_of, library):
    """TensorRT-RTX opens itself by a name that its wheel lacks; without that name, a plugin aborts the process."""
    import tensorrt_rtx_libs

    folder = next(iter(tensorrt_rtx_libs.__path__))
    before = sorted(path.name for path in Path(folder).iterdir())
    done = run(BUILD, bundle_of("tiny", "float16", "plugin").path, library)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path(folder).iterdir()) == before


EARLIER = {
    "the package": "import tensorrt_rtx",
    "its libraries": "import tensorrt_rtx_libs",
    "links": """
import ctypes, os, tempfile
from importlib.util import find_spec
folder = next(iter(find_spec("tensorrt_rtx_libs").submodule_search_locations))
for name in ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
    link = os.path.join(tempfile.mkdtemp(dir=os.environ["LINKS"]), name)
    os.symlink(os.path.join(folder, name), link)
    ctypes.CDLL(link)
""",
}


@pytest.mark.parametrize("opened", EARLIER)
def test_a_plugin_build_bears_that_tensorrt_rtx_was_opened_before(bundle_of, library, tmp_path, monkeypatch, opened):
    monkeypatch.setenv("LINKS", str(tmp_path))
    done = run(BUILD.replace("# FIRST", EARLIER[opened]), bundle_of("tiny", "float16", "plugin").path, library)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip(), "decode.engine").is_file()


def test_where_the_name_can_not_be_given_one_line_names_a_way_out_that_works(bundle_of, library, tmp_path, monkeypatch):
    refuse = """
import os
def refuse(name):
    raise OSError("no files in memory")
os.memfd_create = refuse
"""
    bundle = bundle_of("tiny", "float16", "plugin").path
    refused = run(BUILD.replace("# FIRST", refuse), bundle, library)
    assert refused.returncode == 1
    assert refused.stderr.startswith("EngineBuildError: tensorrt_rtx can't open libtensorrt_rtx.so (")
    assert len(refused.stderr.splitlines()) == 1
    advice, _, target = refused.stderr.strip().rpartition(" to ")
    assert advice.endswith("set LD_LIBRARY_PATH to a folder with a link libtensorrt_rtx.so")
    (tmp_path / "libtensorrt_rtx.so").symlink_to(target)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    built = run(BUILD.replace("# FIRST", refuse), bundle, library)
    assert built.returncode == 0, built.stderr


def test_a_library_without_a_kernel_for_the_head_sizes_is_refused_with_what_is_missing(bundle_of, tmp_path):
    from tests.plugins.fake import fake_table
    from tnllm_export.plugins.library import build_library

    table = fake_table()
    some = replace(table, kernels=tuple(kernel for kernel in table.kernels if kernel.key_dim != 32))
    done = run(BUILD, bundle_of("tiny", "float16", "plugin").path, build_library(some, cache=tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(r"EngineBuildError: .* has no kernels for any GPU with float16 heads of .*32x16", done.stderr)


def test_a_state_in_place_takes_a_preview_feature_and_copies_that_tensorrt_adds(bundle_of, library):
    """Why the graphs do not ask for it: past_state is an input of the network, which TensorRT protects by a copy."""
    bundle = bundle_of("tiny", "float16", "plugin")
    trt = import_tensorrt(engine_target(RTX))
    load_plugins(trt, library)
    last_error(trt)
    sizes = {}
    for in_place, preview in ((0, False), (1, False), (1, True)):
        model = read_graph(bundle.decode_path)
        make_weights_inputs(model)
        for node in model.graph.node:
            if node.domain == "tnllm":
                node.attribute.append(onnx.helper.make_attribute("in_place", in_place))
        builder = make_builder(trt)
        network = parse_network(trt, builder, model, bundle.decode_path)
        config = builder.create_builder_config()
        add_profile(builder, config, network, SMALL.profile)
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, preview)
        engine = builder.build_serialized_network(network, config)
        sizes[in_place, preview] = 0 if engine is None else len(memoryview(engine))
        assert ("kALIASED_PLUGIN_IO_10_03 not enabled" in last_error(trt)) == (engine is None)
    assert sizes[1, False] == 0
    assert sizes[1, True] > 1.5 * sizes[0, False] > 0


def test_a_file_that_is_no_plugin_library_is_named(bundle_of, tmp_path):
    (tmp_path / "not.so").write_bytes(b"no library")
    done = run(BUILD, bundle_of("tiny", "float16", "plugin").path, tmp_path / "not.so")
    assert done.returncode == 1
    assert "not.so: tensorrt_rtx" in done.stderr
    assert "make the library again with `tnllm build-plugin`" in done.stderr


def test_another_library_in_the_same_process_is_refused(bundle_of, library, tmp_path):
    bundle = bundle_of("tiny", "float16", "plugin")
    build_engines(bundle, RTX, replace(SMALL, plugin_library=library))
    other = tmp_path / "other.so"
    other.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(EngineBuildError, match="another plugin library is in use in this process"):
        build_engines(bundle, RTX, replace(SMALL, plugin_library=other))
    # It would have been another key.
    assert len(list((bundle.path / "engines" / RTX).iterdir())) == 1


@pytest.mark.parametrize(
    ("fields", "phase", "word"),
    [
        ([("contract", 1), ("in_place", 0)], "RUNTIME", None),
        ([("in_place", 1)], "BUILD", None),
        ([], "BUILD", None),
        ([("contract", 1)], "RUNTIME", "the engine lacks the field in_place"),
        ([], "RUNTIME", "the engine lacks the field contract"),
        ([("contract", 2), ("in_place", 0)], "RUNTIME", "the engine has version 2 of the plugin's fields; expected 1"),
        ([("contract", 1.0), ("in_place", 0)], "RUNTIME", "field contract has type 1 and 1 values; expected one int32"),
        ([("in_place", 7)], "BUILD", "field in_place is 7; expected 0 or 1"),
        ([("scale", 1)], "BUILD", "unknown field scale; expected contract or in_place"),
    ],
)
@pytest.mark.parametrize("op", ["LightningAttention", "LightningAttentionStep"])
def test_plugins_are_made_from_their_fields_or_say_what_is_wrong_with_them(library, capfd, op, fields, phase, word):
    import numpy as np

    trt = import_tensorrt(engine_target(RTX))
    load_plugins(trt, library)
    creator = trt.get_plugin_registry().get_creator(op, "1", "tnllm")
    assert [field.name for field in creator.field_names] == ["contract", "in_place"]
    values = [np.array([value], np.int32 if isinstance(value, int) else np.float32) for _, value in fields]
    kinds = [trt.PluginFieldType.INT32 if v.dtype == np.int32 else trt.PluginFieldType.FLOAT32 for v in values]
    given = [trt.PluginField(name, v, kind) for (name, _), v, kind in zip(fields, values, kinds, strict=True)]
    plugin = creator.create_plugin("x", trt.PluginFieldCollection(given), getattr(trt.TensorRTPhase, phase))
    assert (plugin is None) == (word is not None)
    said = capfd.readouterr().err
    assert said == "" if word is None else f"tnllm::{op}: {word}" in said
