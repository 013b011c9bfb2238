"""The benchmark of engines builds real ones, in processes of their own, and shows where the weights are."""

from importlib.util import find_spec

import pytest

from benchmarks import engines, report, scale

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform"),
]


@pytest.fixture(scope="module")
def records():
    with pytest.MonkeyPatch.context() as patch:
        shape = {"decoder_embed_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "glu_dim": 96}
        patch.setitem(scale.SHAPES, "tiny", shape)
        patch.setitem(scale.SHARDS, "tiny", 1)
        return engines.run(size="tiny", rounds=2)


@pytest.mark.parametrize("light", ["external", "stripped"])
def test_weights_are_in_both_engines_or_in_none(records, light):
    sizes = {(record.case, record.metric): record.value for record in records if record.unit == "MB"}
    embedding = 2 * 64000 * 64 / 1e6
    for engine in (engines.PREFILL, engines.DECODE):
        difference = sizes["tiny | embedded", engine] - sizes[f"tiny | {light}", engine]
        assert difference == pytest.approx(embedding, rel=0.05)


def test_every_cost_is_measured(records):
    assert [record.case for record in records] == [f"tiny | {weights}" for weights in engines.WEIGHTS for _ in range(5)]
    for record in records:
        assert record.value > 0
        assert record.versions["tensorrt-rtx-cu13"]
        if record.metric == engines.PEAK:
            # TensorRT-RTX's library alone has 0.2 GiB.
            assert 0.2 < record.value < record.floor == 24


def test_the_table_has_a_line_for_each_kind_of_weights(records):
    head, _, *lines = report._engines_table(records).splitlines()
    assert head == "| model | `--weights` | engines | time, both | processor time | peak memory |"
    assert [line.split(" | ")[1] for line in lines] == ["`embedded`", "`external`", "`stripped`"]
    peak = next(record.value for record in records if record.metric == engines.PEAK)
    assert lines[0].endswith(f" s | {peak:.1f} GiB |")
