"""The decode benchmark compares one step with float64 before it times it."""

from benchmarks import decode, names
from benchmarks.attention_cases import Shape
from benchmarks.decode import StepForm
from tnllm_export.kernels.lightning_attention import lightning_attention_step

SHAPE = Shape(2, 3, 1, key_dim=32, value_dim=16)


def test_a_step_that_is_right_is_timed_beside_its_peers():
    def wrong(query, key, value, slope_rate, state):
        return value, state

    def from_log_decay(query, key, value, log_decay, state):
        return lightning_attention_step(query, key, value, -log_decay, state)

    forms = [
        StepForm(names.OURS, lightning_attention_step, "pytorch"),
        StepForm(names.FLA_RECURRENT, from_log_decay, "pytorch", rate_sign=-1),
        StepForm("wrong", wrong),
    ]
    records = list(decode.measure(SHAPE, forms, {}, "cpu"))
    times = [record for record in records if record.name == names.DECODE]
    assert [record.peer.partition(" (")[0] for record in times] == [names.FLA_RECURRENT, "wrong"]
    assert times[0].value > 0
    assert times[0].peer_value > 0
    assert times[1].peer_value is None
    parity = [r for r in records if r.name == names.DECODE_PARITY and r.peer == names.FLA_RECURRENT]
    assert [record.case for record in parity] == [f"{SHAPE} | bfloat16 | output", f"{SHAPE} | bfloat16 | state"]
    assert all(0 < record.value <= record.floor for record in parity)


def test_the_floor_is_the_state_read_and_written_and_the_vectors():
    assert decode.step_bytes(SHAPE) == 6 * (2 * 4 * 32 * 16 + 2 * (32 + 32 + 16 + 16))


def test_ours_and_pytorch_are_always_there():
    forms, absent = decode.available_steps()
    found = {form.name for form in forms}
    assert {names.OURS, names.PYTORCH} <= found
    assert found | set(absent) == {names.OURS, names.PYTORCH, names.IN_PLACE, names.FLA_RECURRENT}
