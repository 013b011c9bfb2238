"""The report as a page and on the terminal."""

import copy
import io
import math
import re

import pytest
import torch
from rich.console import Console

from tests.page import Page
from tnllm_export.runtime import TorchRuntime
from tnllm_export.verify import Workload, verify_runtime
from tnllm_export.verify.page import html_page
from tnllm_export.verify.report import terminal_report

QUICK = Workload(lengths=(1, 9), decoded=3, greedy=3, piece=4)


@pytest.fixture(scope="module")
def passed(eager):
    return verify_runtime(eager, eager, text_ids=range(40), text_source="<b>a & b</b>", seed=7, workload=QUICK)


@pytest.fixture(scope="module")
def failed(eager, model):
    broken = copy.deepcopy(model)
    broken.model.layers[1].channel_mixer.l3.weight.data.fill_(math.nan)
    return verify_runtime(TorchRuntime(broken), eager, workload=QUICK)


@pytest.mark.parametrize("name", ["passed", "failed"])
def test_the_page_needs_nothing_but_itself(name, request):
    text = html_page(request.getfixturevalue(name))
    page = Page(text)
    assert not page.open
    # Plots refer to their own markers, and to nothing else.
    assert page.loads
    assert all(link.startswith("#") for link in page.loads)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "http" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img"} & set(page.tags)


def test_the_page_has_the_three_plots_and_every_figure(passed):
    text = html_page(passed)
    labels = re.findall(r'aria-label="([^"]*)"', text)
    assert labels == [
        "relative error of each layer's state",
        "relative error of the logits by position",
        "KL divergence (nats) by position",
    ]
    assert "PASS" in text
    assert "FAIL" not in text
    for check in passed.checks:
        assert check.claim in text
    for version in passed.versions.values():
        assert version in text
    assert "seed 7" in text


def test_what_a_user_wrote_is_escaped(passed):
    text = html_page(passed)
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text
    assert "<b>a & b</b>" not in text


def test_a_failure_shows_at_the_top_and_in_the_plots(failed):
    text = html_page(failed)
    assert text.index("FAIL") < text.index("<h2>")
    assert "not finite" in text
    assert "does not agree" in text


def test_the_terminal_shows_checks_stages_layers_and_greedy_texts(passed):
    console = Console(width=140, file=io.StringIO())
    console.print(terminal_report(passed))
    text = console.file.getvalue()
    assert "PASS" in text
    for words in (*(check.claim for check in passed.checks), "prompt in pieces", "KL (nats)", "12 of 12 tokens agree"):
        assert words in text


def test_half_precision_shows_its_yardstick(model):
    rounded = TorchRuntime(copy.deepcopy(model).cast_weights(torch.float16))
    exact = TorchRuntime(copy.deepcopy(rounded.model).cast_weights(torch.float32))
    report = verify_runtime(rounded, rounded, exact=exact, workload=QUICK)
    assert "Beside float32" in html_page(report)


def test_plots_leave_a_users_own_matplotlib_alone(passed):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    html_page(passed)
    assert dict(mpl.rcParams) == before
