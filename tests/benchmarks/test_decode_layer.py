"""The benchmark of decode kernels: small shapes, checked before they are timed, each beside its floor."""

from dataclasses import replace

import pytest

from benchmarks.inference_plan import SIZES
from benchmarks.names import DECODE_LAYER

pytest.importorskip("triton")

from benchmarks import decode_layer
from tnllm_export.kernels.dispatch import use_kernels

SIZE = replace(
    SIZES[0],
    name="tiny",
    config=SIZES[0].config.model_copy(
        update={"vocab_size": 24, "decoder_embed_dim": 16, "decoder_attention_heads": 2, "glu_dim": 24,
                "decoder_layers": 1, "linear_use_lrpe_list": (True,)}
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _looser_on_the_interpreter(monkeypatch, device):
    """It cuts bfloat16 off instead of rounding it."""
    if device.type == "cpu":
        monkeypatch.setattr(decode_layer, "ERROR_LIMIT", 2e-2)
        monkeypatch.setattr(decode_layer, "PYTORCH_SHARE", 5)


@pytest.mark.slow
def test_kernels_and_tokens_are_checked_and_timed(monkeypatch, device):
    monkeypatch.setattr(decode_layer, "BATCHES", (1, 9))
    with use_kernels("triton"):
        records = list(decode_layer.run(sizes=(SIZE,), device=device.type))
    assert {record.name for record in records} == {DECODE_LAYER}
    times = [record for record in records if record.metric == "time"]
    assert [record.case for record in times if "token" in record.case] == ["tiny token, B 1", "tiny token, B 9"]
    assert len(times) == 2 * (5 + 1 + 1)
    assert all(record.value > 0 and record.floor > 0 for record in times)
    assert sum(record.peer == decode_layer.LINEAR and record.peer_value > 0 for record in times) == 10
    assert sum(record.value > 0 for record in records if record.metric == "relative error") == 10


def test_nothing_is_timed_that_is_wrong(monkeypatch, device):
    monkeypatch.setattr(decode_layer, "ERROR_LIMIT", 0.0)
    case = decode_layer.maps(SIZE)[3]
    with pytest.raises(RuntimeError, match="tiny l3, residual, B 1: relative error"):
        list(decode_layer.map_records(SIZE, case, 1, device.type))
