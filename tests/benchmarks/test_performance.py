"""The performance page is a function of the results, and says what is missing and why."""

import shutil

import pytest

from benchmarks import names, performance, performance_plots, report
from benchmarks.records import Record, save


def time(name, case, peer, peer_value, value=1.0, unit="ms"):
    return Record(name, case, "time", unit, value, 0.5, peer, peer_value)


@pytest.fixture
def records():
    found = []
    for tokens, factor in ((1024, 1), (4096, 4)):
        for name in (names.FORWARD, names.BACKWARD):
            case = f"1, 32, {tokens} | launched"
            found += [time(name, case, names.FLA_CHUNK, 4.0 * factor, 1.0 * factor),
                      time(name, case, names.FLA_FUSED, 2.0 * factor, 1.0 * factor),
                      time(name, case, f"{names.LIGHTNING} (absent: ImportError: no)", None, 1.0 * factor)]  # fmt: skip
        found.append(Record(names.MEMORY, f"1, 32, {tokens}", "peak memory", "GiB", 2.0, None, names.FLA_CHUNK, 8.0))
    for context, ours, llama in ((2048, 100e3, 120e3), (131072, 98e3, 20e3)):
        case = f"{context} | compiled"
        found.append(Record(names.TRAINING, case, "tokens per second", "tokens/s", ours))
        found.append(Record(names.TRAINING, case, "tokens per second", "tokens/s", ours, None, "LLaMA form", llama))
    found.append(Record(names.PARITY, "1, 32, 64 | bfloat16 | layer 15 | output", "relative error", "1", 1.6e-3, 5e-3,
                        names.BLOCKED, 1.5e-3))  # fmt: skip
    found.append(time(names.DECODE, "8, 32, 1 | graph", names.FLA_RECURRENT, 16.0, 9.0, "µs"))
    for size, context, llama in (("7B", 1024, 4.0), ("7B", 131072, 24.0), ("1B", 1024, 0.8), ("1B", 131072, None)):
        peer = names.LLAMA_DECODE + ("" if llama else " (absent: out of memory)")
        for metric, unit in (("time per token", "ms"), ("peak memory", "GiB")):
            found.append(Record(names.INFERENCE_CONTEXT, f"{size} | {context}", metric, unit, 3.5, 3.0, peer, llama))
    return found


def test_a_comparison_is_with_the_best_linear_peer_and_names_what_is_missing(records):
    table = performance.time_table([record for record in records if record.name == names.FORWARD])
    short, long = (line for line in table.splitlines() if line.startswith("| 1, 32"))
    assert "| 0.500 | 1.000 | 4.000 | 2.000 | – | 0.50 | at most 0.5 | 0.50 |" in short
    assert "| 4.000 | 16.000 | 8.000 | – | 0.50 | at most 0.5 | 0.12 |" in long
    assert "- lightning-attn: ImportError: no (1, 32, 1024 | launched; 1, 32, 4096 | launched)" in table


def test_the_training_table_says_how_flat_the_speed_is(records):
    table = performance.training_table([record for record in records if record.name == names.TRAINING])
    assert "| tokens per second | **ours** | 100000 | 98000 | 2.0% |" in table
    assert "| tokens per second | LLaMA form | 120000 | 20000 | 500.0% |" in table


def test_a_value_that_could_not_be_measured_is_a_dash():
    table = performance.time_table([time(names.FORWARD, "1, 32, 1024 | graph", names.FLA_CHUNK, 2.0, value=None)])
    assert "| 0.500 | – | 2.000 | – | at most 0.6 | – |" in table


def test_every_kind_of_record_gets_its_place_and_its_plot(records, tmp_path):
    docs, results = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    for page in report.PAGES:
        shutil.copy(report.ROOT / page, tmp_path / page)
    save(records, results / "some-gpu.json")
    report.write(tmp_path, results)
    page = (docs / "performance.md").read_text()
    for name in {record.name for record in records}:
        begin = page.index(f"<!-- begin {name} -->")
        assert "Measured on some-gpu" in page[begin : page.index(f"<!-- end {name} -->")]
    plots = performance_plots
    for plot in (plots.TIME, plots.MEMORY, plots.TRAINING, plots.INFERENCE):
        assert (docs / "images" / plot).stat().st_size > 1000
        assert f"(images/{plot})" in page
    assert "| 1, 32, 4096 | 4.000 | 8.000 (fla fused) | 0.50 | 0.500 | 0.12 |" in (tmp_path / "README.md").read_text()
    first = (docs / "images" / performance_plots.TIME).read_bytes()
    report.write(tmp_path, results)
    assert (docs / "performance.md").read_text() == page
    assert (docs / "images" / performance_plots.TIME).read_bytes() == first


def test_plots_show_one_sequence_of_k_equal_v_and_the_floor(records):
    other = time(names.FORWARD, "1, 32, 4096, K 256 | launched", names.FLA_CHUNK, 9.0)
    series = performance_plots.over_tokens(
        [record for record in [*records, other] if record.name == names.FORWARD], names.LAUNCHED
    )
    assert series[names.OURS] == [(1024, 1.0), (4096, 4.0)]
    assert series["floor"] == [(1024, 0.5), (4096, 0.5)]
    assert names.LIGHTNING not in series


def test_every_marker_of_the_page_is_one_that_the_report_fills():
    page = (report.ROOT / "docs" / "performance.md").read_text()
    assert {line[11:-4] for line in page.splitlines() if line.startswith("<!-- begin ")} == set(performance.TABLES)


def test_time_and_memory_over_context_stand_side_by_side_and_say_how_they_grow(records):
    table = performance.context_table([record for record in records if record.name == names.INFERENCE_CONTEXT])
    assert "| 7B | time per token (ms) | **ours** | 3.500 | 3.500 | 1.000 |" in table
    assert "| 7B | time per token (ms) | LLaMA form, SDPA | 4.000 | 24.000 | 6.000 |" in table
    assert "| 1B | peak memory (GiB) | LLaMA form, SDPA | 0.800 | – |  |" in table
    assert "- LLaMA form, SDPA: out of memory (1B | 131072)" in table


def test_every_row_of_a_table_has_a_cell_for_each_column(records):
    found = [record for record in records if record.name == names.INFERENCE_CONTEXT]
    found += [
        inference("7B | decode, B 1", "peak memory", 13.5, 14.0, "weights and state", 13.0, "GiB"),
        Record(names.INFERENCE_PARITY, "1B shape, B 1 | decoded", "distance", "1", 1e-2, 2e-2, names.PYTORCH, 1e-2),
        Record(names.INFERENCE_ATTENTION, "7B | 4096", "time of one layer", "µs", None, 16.0, "SDPA flash", 40.0),
    ]
    for name in {record.name for record in found}:
        lines = performance.TABLES[name]([record for record in found if record.name == name]).split("\n\n")[0]
        counts = {line.count("|") for line in lines.splitlines()}
        assert len(counts) == 1, lines


def inference(case, metric, value, floor=None, peer=None, peer_value=None, unit="ms"):
    return Record(names.INFERENCE, case, metric, unit, value, floor, peer, peer_value)


INFERENCE = [
    inference("7B | decode, B 1, graph only", "time per token", 4.0, 3.4),
    inference("7B | prefill of 8192 tokens", "rate", 480.0, 800.0, names.PYTORCH, 160.0, "TFLOP/s"),
    inference("7B | prefill of 8192 tokens", "time", 20.0, 15.0, names.PYTORCH, 50.0),
    inference("1B | decode, B 1, host included", "time per token", 0.5, 0.4, names.PYTORCH, 5.0),
    inference("1B | decode, B 1, host included", "time per token", 0.5, 0.4, f"{names.COMPILED} (absent: slow)"),
    inference("1B | decode, B 1, generation", "time per token", 0.45, 0.4),
    inference("7B | decode, B 1", "peak memory", 13.5, 14.0, "weights and state", 13.0, "GiB"),
    inference("7B | decode at 131072 tokens of context", "time per token", 4.0, None, "at 1024 tokens", 4.0),
]


def test_inference_is_held_against_floor_target_and_peers():
    table = performance.inference_table(INFERENCE)
    assert "| 4.000 ms | 3.400 | 0.85 | floor / ours at least 0.85 |  |" in table
    assert "| 480.000 TFLOP/s | 800.000 | 0.60 |  | PyTorch 160.000 (3.00) |" in table
    assert "| 20.000 ms | 15.000 | 0.75 | floor / ours at least 0.60 | PyTorch 50.000 (0.40) |" in table
    assert "| 13.500 GiB | 14.000 | 1.04 | at most the limit | weights and state 13.000 (1.04) |" in table
    assert "| 4.000 ms | – | – | ours / that at 1024 at most 1.02 | at 1024 tokens 4.000 (1.00) |" in table
    assert "| 0.450 ms | 0.400 | 0.89 | floor / ours at least 0.75 |  |" in table
    assert "| 0.500 ms | 0.400 | 0.80 |  | PyTorch 5.000 (0.10) |" in table
    assert "- torch.compile, reduce-overhead: slow (1B | decode, B 1, host included)" in table
    assert table.index("7B | prefill") < table.index("1B | decode")


def test_the_readme_shows_decode_with_the_host_and_prefill():
    table = performance.short_inference_table(INFERENCE)
    assert "| 7B | prefill of 8192 tokens | 20.000 | 15.000 | 0.75 | – | 50.000 |" in table
    assert "| 1B | decode, B 1 | 0.500 | 0.400 | 0.80 | – | 5.000 |" in table
    assert "| 1B | decode, B 1, generation | 0.450 | 0.400 | 0.89 | – | – |" in table
    assert len(table.splitlines()) == 5


def test_the_quickest_attention_is_held_against_the_floor():
    forms = (("SDPA flash", 40.0), ("SDPA cudnn", 20.0), ("SDPA x (absent: no)", None))
    case = (names.INFERENCE_ATTENTION, "7B | 4096", "time of one layer", "µs", None, 16.0)
    found = [Record(*case, peer, value) for peer, value in forms]
    table = performance.attention_table(found)
    assert "| 7B | 4096 | 16.0 | 40.0 | 20.0 | – | 0.80 |" in table


def test_the_readme_takes_the_way_of_calling_in_which_every_linear_peer_was_measured():
    absent = f"{names.FLA_CHUNK} (absent: no capture)"
    found = []
    for shape, graph_peer, graph_value in (("1, 32, 64", names.FLA_CHUNK, 2.0), ("1, 32, 64, ragged", absent, None)):
        for how, peer, value, ours in (
            ("graph", graph_peer, graph_value, 1.0),
            ("launched", names.FLA_CHUNK, 4.0, 3.0),
        ):
            found += [time(names.FORWARD, f"{shape} | {how}", peer, value, ours),
                      time(names.FORWARD, f"{shape} | {how}", names.FLA_FUSED, 8.0, ours)]  # fmt: skip
    _, _, plain, ragged = performance.short_table(found).splitlines()
    assert plain == "| 1, 32, 64 | 1.000 | 2.000 (fla chunk) | 0.50 | 0.500 | 0.50 |"
    assert ragged == "| 1, 32, 64, ragged | 3.000 | 4.000 (fla chunk) | 0.75 | 0.500 | 0.17 |"


def test_a_comparison_has_a_cell_for_each_heading():
    record = Record(names.LAYER, "norm | 8 x 16", "relative error", "1", 1.6e-3, 5e-3, "eager PyTorch", 1.6e-3)
    heading, _, line = performance.comparison_table([record]).splitlines()
    assert heading.count("|") == line.count("|")
    assert line == "| norm, 8 x 16 | relative error | 1.6e-03 | 5.0e-03 | 3.12 | eager PyTorch | 1.6e-03 | 1.00 |"
