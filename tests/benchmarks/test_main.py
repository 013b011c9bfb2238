"""The command finds benchmarks by name, and takes over results of other machines."""

import json

import pytest

import benchmarks.__main__ as command
from benchmarks import constant_cost, report
from benchmarks.records import Record, load, save


def test_a_name_that_is_no_benchmark_is_refused():
    with pytest.raises(SystemExit, match="no benchmark 'speed'; there are: drift"):
        command.main(["speed"])


def test_a_benchmark_is_found_by_its_name_and_writes_where_it_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constant_cost, "run", lambda progress: [Record("constant cost", "c", "m", "s", 1.0)])
    monkeypatch.setattr(report, "write", pytest.fail)
    command.main(["constant cost", "--output", str(tmp_path / "out.json")])
    assert capsys.readouterr().out == f"constant cost: {tmp_path / 'out.json'}\n"
    assert load(tmp_path / "out.json")[0].value == 1.0


def test_results_of_another_machine_are_taken_over(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "write", lambda: None)
    save([Record("a", "c", "m", "s", 1.0), Record("b", "c", "m", "s", 2.0)], tmp_path / "results" / "gpu.json")
    save([Record("a", "c", "m", "s", 3.0, commit="abc")], tmp_path / "gpu.json")
    command.main(["merge", str(tmp_path / "gpu.json")])
    found = {entry["name"]: entry for entry in json.loads((tmp_path / "results" / "gpu.json").read_text())}
    assert found["a"]["value"] == 3.0
    assert found["a"]["commit"] == "abc"
    assert found["b"]["value"] == 2.0


def test_without_a_gpu_its_benchmarks_are_left_out(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command._runnable() == ["drift", "constant cost", "scale", "engines"]
    assert "left out, for want of a CUDA device: attention, decode, training" in capsys.readouterr().err


def test_a_benchmark_that_breaks_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    from benchmarks import drift

    def broken(progress):
        raise RuntimeError("no luck")

    monkeypatch.setattr(drift, "run", broken)
    monkeypatch.setattr(constant_cost, "run", lambda progress: [Record("constant cost", "c", "m", "s", 1.0)])
    with pytest.raises(SystemExit, match="failed: drift; what they had measured is kept"):
        command.main(["drift", "constant cost", "--output", str(tmp_path / "out.json")])
    assert "no luck" in capsys.readouterr().err
    assert load(tmp_path / "out.json")[0].value == 1.0
