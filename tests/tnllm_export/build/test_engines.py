"""Real TensorRT-RTX engines, built without a GPU: what is in them, what makes them new, what they weigh."""

import hashlib
import importlib.metadata
import signal
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tnllm_export.build import EngineOptions, build_engines
from tnllm_export.build.engine import make_builder
from tnllm_export.build.network import add_profile, make_weights_inputs, parse_network, put_placeholders, read_graph
from tnllm_export.build.pipeline import _spec
from tnllm_export.bundle import MANIFEST, Bundle, open_bundle
from tnllm_export.bundle.engines import engines_of, find_engines
from tnllm_export.cli.main import app
from tnllm_export.errors import BundleNotFoundError, EngineMismatchError
from tnllm_export.inspection import inspect
from tnllm_export.tensorrt import engine_target, import_tensorrt

# Not importorskip: nothing imports TensorRT that does not use it.
pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform")

RTX = "tensorrt-rtx"
SMALL = EngineOptions(max_batch=3, max_prompt=65, opt_prompt=63)  # what `built_bundle` has
MAGIC = b"vtrt"


def replace_weights(bundle: Bundle) -> Bundle:
    """Change one weight, as another training run would."""
    data = bytearray(bundle.weights_path.read_bytes())
    data[-1] ^= 1
    bundle.weights_path.write_bytes(data)
    record = bundle.manifest.files[bundle.manifest.weights]
    changed = record.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    files = {**bundle.manifest.files, bundle.manifest.weights: changed}
    (bundle.path / MANIFEST).write_text(bundle.manifest.model_copy(update={"files": files}).to_text())
    return open_bundle(bundle.path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_demo_checkpoint_becomes_engines_for_prefill_and_decode(bundle_of, dtype):
    bundle = bundle_of("demo", dtype, "matmul")
    result = build_engines(bundle, RTX, EngineOptions(max_batch=4, max_prompt=128))
    assert not result.cached
    for program in ("prefill", "decode"):
        engine = result.engines.file(program).read_bytes()
        assert engine.startswith(MAGIC)
        # The size that TensorRT wrote into its own header.
        assert int.from_bytes(engine[16:24], "little") == len(engine)
        assert len(engine) > bundle.weights_path.stat().st_size
    assert {MANIFEST, "engines"} <= {path.name for path in bundle.path.iterdir()}
    assert open_bundle(bundle.path).manifest == bundle.manifest


@pytest.mark.parametrize("weights", ["embedded", "external", "stripped"])
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_networks_are_strongly_typed_and_take_every_batch_and_prompt_of_the_profile(exported, program, weights):
    bundle = exported("tiny", "bfloat16", "matmul")
    graph = bundle.prefill_path if program == "prefill" else bundle.decode_path
    trt = import_tensorrt(engine_target(RTX))
    builder = make_builder(trt)
    model = read_graph(graph)
    if weights != "embedded":
        assert make_weights_inputs(model) == set(bundle.weights_layout().names)
    network = parse_network(trt, builder, model, graph)
    if weights == "stripped":
        put_placeholders(trt, network, bundle.weights_layout().names)
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    ports = [network.get_input(place) for place in range(network.num_inputs)]
    names = {port.name for port in ports}
    stored = set(bundle.weights_layout().names)
    assert (stored <= names) == (weights == "external")
    types = {port.name: port.dtype for port in ports}
    assert types["input_ids"] == trt.int64
    assert types["past_state.1"] == trt.float32
    assert weights != "external" or types["model.layers.1.channel_mixer.l1.weight"] == trt.bfloat16

    config = builder.create_builder_config()
    add_profile(builder, config, network, SMALL.profile)
    assert config.num_optimization_profiles == 1
    dynamic = {port.name for port in ports if -1 in tuple(port.shape)}
    expected = {"input_ids", "positions", "past_state.0", "past_state.1"} | (
        {"lengths"} if program == "prefill" else set()
    )
    assert dynamic == expected
    shapes = {tuple(network.get_output(place).shape) for place in range(network.num_outputs)}
    assert {(-1, 97), (-1, 3, 32, 16), (-1, 3, 16, 16)} == shapes


def test_a_second_build_takes_the_engines_that_are_there_even_where_the_bundle_was_moved(built_bundle):
    [there] = engines_of(built_bundle.path)
    stamps = {path.name: path.stat().st_mtime_ns for path in there.path.iterdir()}
    assert sorted(stamps) == ["decode.engine", "engines.json", "prefill.engine"]
    again = build_engines(built_bundle, RTX, SMALL)
    assert again.cached
    assert again.engines == there
    assert {path.name: path.stat().st_mtime_ns for path in there.path.iterdir()} == stamps


def test_inspection_shows_what_the_engines_are_and_whether_they_are_the_bundles(built_bundle):
    [shown] = inspect(built_bundle.path).engines
    assert (shown.target, shown.version) == (RTX, importlib.metadata.version("tensorrt-rtx-cu13"))
    assert (shown.dtype, shown.lowering, shown.weights, shown.plugin) == ("float16", "matmul", "embedded", None)
    assert shown.gpus == "8.0, 8.6, 8.9, 12.0 and later"
    assert shown.profile == {"max_batch": 3, "opt_batch": 1, "max_prompt": 65, "opt_prompt": 63}
    assert shown.current is True
    engine = Path(shown.path) / "decode.engine"
    alone = inspect(engine)
    assert (alone.kind, alone.bytes) == ("engine", engine.stat().st_size)
    assert alone.engines == (replace(shown, current=None),)
    assert [inspect(replace_weights(built_bundle).path).engines[0].current] == [False]
    printed = CliRunner().invoke(app, ["inspect", str(built_bundle.path)]).stdout
    assert "batch 1 … 3, prompt 1 … 65 tokens at once" in printed
    assert "built from other graphs or weights than the bundle has now" in printed
    with pytest.raises(EngineMismatchError, match=r"no readable engines\.json"):
        inspect(engine.rename(built_bundle.path / "lost.engine"))
    with pytest.raises(BundleNotFoundError):
        inspect(engine)


def test_a_changed_weight_profile_or_gpu_makes_new_engines_beside_the_old(built_bundle):
    others = [replace(SMALL, max_prompt=64), replace(SMALL, compute_capabilities=("86",))]
    keys = {_spec(built_bundle, RTX, replace(SMALL, tf32=tf32), "1", "").key for tf32 in (False, True)}
    assert len(keys) == 2
    sets = [build_engines(built_bundle, RTX, options) for options in (SMALL, *others)]
    sets.append(build_engines(replace_weights(built_bundle), RTX, SMALL))
    assert [result.cached for result in sets] == [True, False, False, False]
    assert len({result.engines.spec.key for result in sets}) == 4
    assert len(engines_of(built_bundle.path)) == 4
    assert len({result.engines.file("decode").read_bytes() for result in sets}) > 1
    # What changed is what is told.
    assert sets[2].engines.spec.compute_capabilities == ("8.6",)
    assert sets[3].engines.spec.weights_sha256 != sets[0].engines.spec.weights_sha256


@pytest.mark.parametrize(("dtype", "lowering"), [("float16", "matmul"), ("bfloat16", "plugin")])
def test_engines_without_weights_weigh_less_than_5_percent_and_outlive_a_change_of_weights(
    bundle_of, request, dtype, lowering
):
    bundle = bundle_of("wide", dtype, lowering)
    library = request.getfixturevalue("library") if lowering == "plugin" else None
    options = EngineOptions(max_batch=2, max_prompt=64, plugin_library=library)
    full = build_engines(bundle, RTX, options).engines
    names = [name.encode() for name in bundle.weights_layout().names]
    assert not all(name in full.file("decode").read_bytes() for name in names)
    others = [replace(options, weights="stripped"), replace(options, weights="external")]
    for other in others:
        light = build_engines(bundle, RTX, other).engines
        for program in ("prefill", "decode"):
            engine = light.file(program).read_bytes()
            share = len(engine) / full.file(program).stat().st_size
            print(f"{program}, {other.weights}: {share:.3%} of the full engine")
            assert share < 0.05
            # What it shall be given: inputs by these names, or weights to refit.
            assert all(name in engine for name in names)
    changed = replace_weights(bundle)
    assert [build_engines(changed, RTX, other).cached for other in others] == [True, True]


def test_a_damaged_engine_is_named_and_built_again(built_bundle):
    [built] = engines_of(built_bundle.path)
    good = built.file("decode").read_bytes()
    bad = good[:-1] + bytes([good[-1] ^ 1])
    built.file("decode").write_bytes(bad)
    with pytest.raises(EngineMismatchError, match=r"decode\.engine.*build again"):
        built.check()
    again = build_engines(built_bundle, RTX, SMALL)
    assert not again.cached
    assert again.engines.file("decode").read_bytes() != bad
    again.engines.check()
    (again.engines.path / "engines.json").write_text("{}")
    assert find_engines(built_bundle.path, again.engines.spec) is None


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3])
def test_ctrl_c_stops_a_build_wherever_it_comes(bundle_of, seconds):
    bundle = bundle_of("tiny", "float16", "matmul")
    before = signal.getsignal(signal.SIGINT)
    started = threading.Event()

    def press() -> None:
        started.wait()
        time.sleep(seconds)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, RTX, SMALL, progress=lambda *_: started.set())
    thread.join()
    assert list((bundle.path / "engines" / RTX).iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_stops_a_build_and_leaves_nothing(bundle_of):
    bundle = bundle_of("tiny", "float16", "matmul")

    def interrupt(stage: str, done: int, total: int, unit: str = "") -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, RTX, SMALL, progress=interrupt)
    assert list((bundle.path / "engines" / RTX).iterdir()) == []


def test_progress_goes_up_and_what_a_killed_build_left_behind_is_removed(bundle_of):
    bundle = bundle_of("tiny", "float16", "matmul")
    seen: dict[str, list[int]] = {}
    leftover = bundle.path / "engines" / RTX / "0123456789abcdef.partial-1-00000000"
    leftover.mkdir(parents=True)
    (leftover / "prefill.engine").write_bytes(bytes(100))

    def note(stage: str, done: int, total: int, unit: str = "") -> None:
        seen.setdefault(stage, []).append(done)

    built = build_engines(bundle, RTX, SMALL, progress=note).engines
    assert list((bundle.path / "engines" / RTX).iterdir()) == [built.path]
    assert list(seen) == ["building the prefill engine", "building the decode engine"]
    for shares in seen.values():
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0, 1000)
        assert len(shares) > 10
