"""The report as a page and on the terminal."""

import dataclasses
import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from tests.page import Page
from tnllm_export.bench import write_page
from tnllm_export.bench.digest import COLUMNS, sections
from tnllm_export.bench.page import html_page
from tnllm_export.bench.report import terminal_report
from tnllm_export.errors import WriteError

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def test_the_page_needs_nothing_but_itself(report):
    text = html_page(report)
    page = Page(text)
    assert not page.open
    assert page.loads
    assert all(link.startswith("#") for link in page.loads)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "http" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img"} & set(page.tags)


def test_the_page_has_every_plot_and_table(report):
    text = html_page(report)
    labels = re.findall(r'aria-label="([^"]*)"', text)
    assert labels == [
        "Time to the first token: seconds to the first token",
        "Decode over context: milliseconds per token",
        "Decode over batch: milliseconds per step",
        "Generation over batch: tokens per second",
        "Time to the first token: gigabytes",
        "Decode over batch: gigabytes",
    ]
    for section in sections(report):
        assert text.count(f"<h2>{section.title}</h2>") == 2
    for column in COLUMNS:
        assert text.count(f"<th>{column}</th>") == 4
    for words in (
        report.device_name,
        report.versions["torch"],
        "does not run on device &#x27;cpu&#x27;",
        "onnxruntime",
    ):
        assert words in text


def test_plots_take_the_colours_of_the_page_light_and_dark(report):
    text = html_page(report)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"(?:fill|stroke): #(?!ffffff)", drawn)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    themes = re.findall(r":root \{([^}]*)\}", text)
    assert {"--ink", "--series-1", "--series-2", "--floor"} <= used
    assert "prefers-color-scheme: dark" in text
    for theme in themes[:2]:
        assert used <= set(re.findall(r"(--[\w-]+):", theme))


def test_what_a_user_wrote_is_escaped(report):
    text = html_page(dataclasses.replace(report, bundle="<b>a & b</b>"))
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text
    assert "<b>a & b</b>" not in text


def test_a_case_without_figures_shows_its_reason_on_page_and_terminal(report):
    result = report.results[0]
    rows = tuple(dataclasses.replace(row, times=None, memory=None, note="no <memory> left") for row in result.rows)
    changed = dataclasses.replace(report, results=(dataclasses.replace(result, rows=rows), *report.results[1:]))
    assert changed.timed == report.timed[1:]
    some = (dataclasses.replace(rows[0], times=result.rows[0].times, note=""), *rows[1:])
    changed = dataclasses.replace(report, results=(dataclasses.replace(result, rows=some), *report.results[1:]))
    # Its decode case after 5 tokens is in two tables.
    assert html_page(changed).count("no &lt;memory&gt; left") == len(rows)
    console = Console(width=200, file=io.StringIO())
    console.print(terminal_report(changed))
    assert console.file.getvalue().count("no <memory> left") == len(rows)


def test_a_report_of_nothing_still_makes_a_page(report):
    empty = dataclasses.replace(report, results=report.results[-1:])
    page = Page(html_page(empty))
    assert page.tags.count("svg") == 6
    assert "not measured" in html_page(empty)


def test_the_terminal_shows_each_sweep_and_each_runtime(report):
    console = Console(width=160, file=io.StringIO())
    console.print(terminal_report(report))
    text = console.file.getvalue()
    for words in (*(section.title for section in sections(report)), "of roofline", "does not run on device 'cpu'"):
        assert words in text
    assert text.count("onnxruntime") > 6


def test_a_page_that_cannot_be_written_is_one_line(report, tmp_path):
    with pytest.raises(WriteError) as caught:
        write_page(report, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_earlier_page_is_replaced_and_nothing_else(report, tmp_path):
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    write_page(report, page)
    write_page(dataclasses.replace(report, bundle="another"), page)
    assert page.read_text(encoding="utf-8") == html_page(dataclasses.replace(report, bundle="another"))
    other.write_text("<!DOCTYPE html><title>Speed of light</title>")
    with pytest.raises(WriteError, match="exists already and is not a report of tnllm bench"):
        write_page(report, other)
    assert other.read_text() == "<!DOCTYPE html><title>Speed of light</title>"


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_without_scrolling_sideways(report, tmp_path):
    """Narrow and wide: the browser's own layout, read from a title that a script of this test sets."""
    script = (
        "<script>onload=()=>{const d=document.documentElement;"
        "document.title='W'+(d.scrollWidth-d.clientWidth)+' P'+[...document.querySelectorAll('figure svg')]"
        ".filter(s=>s.getBoundingClientRect().height>50).length}</script></body>"
    )
    file = tmp_path / "page.html"
    file.write_text(html_page(report).replace("</body>", script), encoding="utf-8")
    for width in (500, 1200):
        command = [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += [f"--window-size={width},2000", "--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        assert "<title>W0 P6</title>" in shown
