"""The attention benchmark checks before it times, compares like with like, and survives peers that break."""

import pytest
import torch

from benchmarks import attention, names
from benchmarks.attention_cases import (
    SHAPES,
    Shape,
    make_inputs,
    reference_results,
    relative_error,
    run_op,
    without_padding,
)
from benchmarks.attention_peers import Form, _ours, _prepared, _sdpa, _swap, available_forms
from tnllm_export.kernels.lightning_attention.reference import lightning_attention_reference

RAGGED = Shape(2, 2, 70, key_dim=32, value_dim=16, lengths=(70, 33))


def plain(name, run=None):
    """A form that computes in PyTorch, or by `run`."""
    return Form(name, (lambda inputs: _prepared(inputs, run)) if run else _ours, kernels="pytorch")


def test_the_reference_of_the_benchmark_is_the_recurrence():
    inputs = make_inputs(RAGGED, torch.float32, "cpu", continued=True)
    found = reference_results(inputs)
    leaves = [x.double().requires_grad_() for x in (inputs.query, inputs.key, inputs.value, inputs.past_state)]
    output, state = lightning_attention_reference(*leaves[:3], inputs.slope_rate.double(), leaves[3], inputs.lengths)
    grads = torch.autograd.grad((output, state), leaves, (inputs.grad_output.double(), inputs.grad_state.double()))
    for mine, expected in zip(
        (found.output, found.state, found.query_grad, found.key_grad, found.value_grad, found.past_grad),
        (output, state, *grads),
        strict=True,
    ):
        assert expected.norm() > 0
        assert relative_error(mine, expected.detach()) < 1e-12


def test_the_floor_counts_valid_tokens_read_and_all_written():
    full = Shape(1, 32, 1024)
    assert full.forward_bytes() == 2 * 32 * 1024 * 4 * 128
    assert full.backward_bytes() == 2 * 32 * 1024 * 7 * 128
    assert RAGGED.forward_bytes() == 2 * 2 * (103 * 80 + 140 * 16)
    assert RAGGED.backward_bytes() == 2 * 2 * (103 * 96 + 140 * 80)


def test_shapes_of_tables_are_told_apart():
    assert len({str(shape) for shape in SHAPES}) == len(SHAPES)
    assert str(RAGGED) == "2, 2, 70, K 32, ragged"
    assert set(attention._TUNE_AT) < {str(shape) for shape in SHAPES}


def test_inputs_are_the_same_for_the_same_seed_and_differ_for_another():
    first, again, other = (make_inputs(RAGGED, torch.bfloat16, "cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.query, other.query)
    assert not first.past_state.any()


@pytest.mark.parametrize("shape", [Shape(1, 2, 65, 16, 16), RAGGED])
def test_what_is_right_is_timed_and_what_is_wrong_is_not(shape):
    def wrong(query, key, value):
        return torch.nan * value * query.sum() * key.sum(), None

    forms = [plain(names.OURS), plain(names.BLOCKED), plain("wrong", wrong)]
    measured = attention.measure(shape, forms, {"gone": "ImportError: no"}, "cpu")
    assert set(measured.times[names.FORWARD, names.LAUNCHED]) == {names.OURS, names.BLOCKED}
    assert measured.absent["wrong"].startswith("wrong: output nan")
    assert measured.errors[names.OURS]["key_grad"] < 3e-3

    records = list(attention.shape_records(shape, measured, "cpu"))
    times = [record for record in records if record.name == names.BACKWARD]
    assert [record.peer for record in times] == [
        names.BLOCKED,
        "gone (absent: ImportError: no)",
        f"wrong (absent: {measured.absent['wrong']})",
    ]
    assert all(record.value > record.floor > 0 for record in times)
    errors = {record.case: record for record in records if record.name == names.PARITY and record.peer == names.BLOCKED}
    assert len(errors) == 5
    assert all(record.value == record.peer_value < record.floor for record in errors.values())


def test_ours_that_breaks_is_recorded_with_the_reason():
    def broken(query, key, value):
        raise RuntimeError("no such kernel")

    measured = attention.measure(Shape(1, 1, 17, 16, 16), [plain(names.OURS, broken), plain(names.BLOCKED)], {}, "cpu")
    records = [r for r in attention.shape_records(Shape(1, 1, 17, 16, 16), measured, "cpu") if r.name == names.FORWARD]
    assert all(record.value is None for record in records)
    assert [record.peer for record in records] == [names.BLOCKED, "ours (absent: RuntimeError: no such kernel)"]


def test_parity_records_cover_all_dtypes_and_decays_with_a_past_state():
    records = list(attention.parity_records("cpu", (Shape(1, 2, 65, 16, 32),)))
    assert len(records) == 3 * 3 * 6
    assert all(record.value <= record.floor for record in records)
    assert any(record.case.endswith("float32 | layer 29, past state | past grad") for record in records)


def test_a_layout_of_a_peer_changes_nothing_but_the_layout():
    inputs = make_inputs(RAGGED, torch.float32, "cpu")
    assert torch.equal(_swap(_swap(inputs.value)), inputs.value)
    cleared = without_padding(inputs.value, RAGGED)
    assert not cleared[1, 33:].any()
    assert torch.equal(cleared[1, :33], inputs.value[1, :33])


def test_flash_attention_is_said_to_be_absent_where_k_is_not_v():
    with pytest.raises(ValueError, match="K = V"):
        _sdpa().prepare(make_inputs(RAGGED, torch.float32, "cpu"))


def test_every_form_is_available_or_absent_with_a_reason():
    forms, absent = available_forms()
    available = {form.name for form in forms}
    assert available | set(absent) == {
        names.OURS, names.BLOCKED, names.FLA_CHUNK, names.FLA_FUSED, names.LIGHTNING, names.SDPA,
    }  # fmt: skip
    assert {names.OURS, names.BLOCKED, names.SDPA} <= available
    assert all(absent.values())


def test_an_op_in_another_dtype_keeps_its_arguments_values():
    inputs = make_inputs(Shape(1, 2, 65, 16, 16), torch.bfloat16, "cpu")
    assert relative_error(run_op(inputs).output, reference_results(inputs).output) < 3e-3
