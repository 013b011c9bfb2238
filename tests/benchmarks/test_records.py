"""Results go to one file per device, and a new run replaces only its own."""

import shutil

import pytest

from benchmarks import report
from benchmarks.records import COMMIT_VARIABLE, Record, load, save, versions


def record(name, value):
    return Record(name, "case", "metric", "s", value)


def test_saving_replaces_records_of_the_same_benchmark_alone(tmp_path):
    path = tmp_path / "results.json"
    save([record("a", 1.0), record("b", 2.0)], path)
    save([record("a", 3.0)], path)
    assert {found.name: found.value for found in load(path)} == {"a": 3.0, "b": 2.0}
    assert all(found.commit and found.versions["torch"] for found in load(path))


def test_a_run_that_breaks_keeps_what_it_has_measured(tmp_path):
    path = tmp_path / "results.json"
    save([record("b", 2.0)], path)

    def broken():
        yield record("a", 1.0)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        save(broken(), path)
    assert {found.name: found.value for found in load(path)} == {"a": 1.0, "b": 2.0}


def test_the_commit_can_be_named_where_there_is_no_repository(monkeypatch):
    monkeypatch.setenv(COMMIT_VARIABLE, "abc1234")
    assert record("a", 1.0).commit == "abc1234"


def test_versions_of_what_is_not_installed_are_left_out():
    assert set(versions(("torch", "no-such-package"))) == {"python", "torch"}


def test_the_pages_are_those_of_the_results(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        shutil.copy(report.ROOT / page, tmp_path / page)
    report.write(tmp_path)
    for page in report.PAGES:
        assert (tmp_path / page).read_text() == (report.ROOT / page).read_text()
    assert (tmp_path / "docs" / "images" / "drift.svg").stat().st_size > 1000


def test_a_page_without_a_place_for_a_table_is_an_error():
    with pytest.raises(ValueError, match=r"page\.md has no place for drift"):
        report._replace("text", "drift", "table", "page.md")
