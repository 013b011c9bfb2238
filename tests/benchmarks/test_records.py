"""Results go to one file per device, and a new run replaces only its own."""

import pytest

from benchmarks import report
from benchmarks.records import Record, load, save


def record(name, value):
    return Record(name, "case", "metric", "s", value)


def test_saving_replaces_records_of_the_same_benchmark_alone(tmp_path):
    path = tmp_path / "results.json"
    save([record("a", 1.0), record("b", 2.0)], path)
    save([record("a", 3.0)], path)
    assert {found.name: found.value for found in load(path)} == {"a": 3.0, "b": 2.0}
    assert all(found.commit and found.versions["torch"] for found in load(path))


def test_the_pages_tables_are_those_of_the_results(tmp_path, monkeypatch):
    page, plot = tmp_path / "parity.md", tmp_path / "drift.svg"
    page.write_text(report.PAGE.read_text())
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "PLOT", plot)
    report.write()
    assert page.read_text() == (report.ROOT / "docs" / "parity.md").read_text()
    assert plot.stat().st_size > 1000


def test_a_page_without_a_place_for_a_table_is_an_error():
    with pytest.raises(ValueError, match="no place for drift"):
        report._replace("text", "drift", "table")
