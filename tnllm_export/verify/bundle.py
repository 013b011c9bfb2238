"""Verify a bundle: run its graphs and the eager model on the same inputs, and keep the report in it."""

import json
import os
import time
from numbers import Integral
from pathlib import Path

import torch

from tnllm_export.bundle import DTYPES, Bundle, open_bundle
from tnllm_export.bundle.reader import REPORT_JSON, REPORT_PAGE
from tnllm_export.errors import RequestError, TextUnsupportedError, UnsupportedTargetError, WriteError
from tnllm_export.models.checkpoint import load_model, open_checkpoint
from tnllm_export.models.tokenizer import load_tokenizer
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import Runtime, TorchRuntime, load_runtime
from tnllm_export.runtime.support import check_kernels
from tnllm_export.verify.cases import SAMPLE_TEXT, check_text_length
from tnllm_export.verify.judge import judge, subject_of
from tnllm_export.verify.page import html_page
from tnllm_export.verify.parity import Workload, fresh_seed, make_cases, run_candidate, run_eager
from tnllm_export.verify.records import ParityReport


def verify_bundle(
    bundle: Bundle | Path | str,
    runtime: str = "onnxruntime",
    *,
    device: str | None = None,
    threads: int | None = None,
    checkpoint: Path | str | None = None,
    text: str | None = None,
    seed: int | None = None,
    workload: Workload | None = None,
    save: bool = True,
    progress: Progress = silent,
) -> ParityReport:
    """Compare a bundle on a runtime with the eager model of the same weights and dtype.

    The models are loaded one after the other, so that the memory of one is enough.

    Args:
        bundle: The bundle or its folder.
        runtime: What runs the graphs.
        device: The device it runs on; default: see `load_runtime`.
        threads: Its CPU threads; default: its own choice.
        checkpoint: Take the eager model's weights from this checkpoint, to verify the bundle's weights too; default:
            from the bundle.
        text: Real text to verify on; default: a sample, where the bundle has a tokenizer.
        seed: Of the random token ids; fresh by default, and reported.
        workload: How much is compared.
        save: Whether to write the report into the bundle: reports/parity.json, reports/parity.html and the summary
            in its manifest.
        progress: Told what is loaded and which tokens have been fed.

    Returns:
        The report. Differences raise nothing: see `ParityReport.passed` and `require_pass`.

    Raises:
        BundleError: No sound bundle.
        RuntimeTargetError: The runtime can't run it.
        TextUnsupportedError: `text` for a bundle without a tokenizer.
        PromptError: `text` is too short.
        RequestError: `seed` is out of its range.
        WriteError: The report can't be written into the bundle.
        ParityError: The answers can't be compared at all.
    """
    started = time.monotonic()
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle), progress=progress)
    if save:
        check_savable(bundle)
    check_kernels(torch.device("cpu"))  # where the eager model runs, after the bundle's turn
    seed = fresh_seed() if seed is None else seed
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise RequestError(f"seed is {seed!r}; expected 0 … 2^63 - 1")
    ids, source = _text_ids(bundle, text)

    progress(f"loading {runtime}", 0, 1)
    candidate = load_runtime(bundle, runtime, device=device, threads=threads)
    progress(f"loading {runtime}", 1, 1)
    cases = make_cases(candidate.info, seed, workload or Workload(), ids, source)
    subject = subject_of(candidate.info, lowering=_lowering(bundle, runtime), bundle=bundle.path.resolve().name)
    answers = run_candidate(candidate, cases, progress)
    del candidate
    truth = run_eager(_eager(bundle, checkpoint), cases, progress)
    exact = None
    if bundle.manifest.dtype != "float32":
        exact = run_eager(_float32(bundle), cases, progress)
    report = judge(subject, cases, answers, truth, exact, seed=seed, seconds=time.monotonic() - started)
    if save:
        save_report(bundle, report)
    return report


def check_savable(bundle: Bundle) -> None:
    """Raise WriteError where a report could not be written into a bundle."""
    if not os.access(bundle.path, os.W_OK):
        raise WriteError(
            f"{bundle.path}: no permission to write the report into the bundle; verify without saving it (--no-save), "
            "or change the folder's permissions"
        )


def save_report(bundle: Bundle, report: ParityReport) -> Bundle:
    """Write a report into a bundle and return the bundle with its new manifest. Raises WriteError."""
    files = {
        REPORT_JSON: (json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        REPORT_PAGE: html_page(report).encode(),
    }
    return bundle.add_reports(report.summary(), files)


def _text_ids(bundle: Bundle, text: str | None) -> tuple[list[int], str]:
    if bundle.tokenizer_path is None:
        if text is not None:
            raise TextUnsupportedError(
                f"{bundle.path}: text was given, but the bundle has no tokenizer; leave the text out to verify on "
                "random token ids"
            )
        return [], ""
    tokenizer = load_tokenizer(bundle.tokenizer_path, bundle.manifest.config.vocab_size)
    if text is None:
        return tokenizer.encode(SAMPLE_TEXT), "sample text"
    ids, source = tokenizer.encode(text), "the given text"
    check_text_length(ids, source)
    return ids, source


def _lowering(bundle: Bundle, runtime: str) -> str | None:
    """The eager model runs no graph."""
    return None if runtime == "torch" else bundle.manifest.lowering


def _eager(bundle: Bundle, checkpoint: Path | str | None) -> Runtime:
    if checkpoint is None:
        return load_runtime(bundle, "torch")
    opened = open_checkpoint(Path(checkpoint))
    if opened.config != bundle.manifest.config:
        raise UnsupportedTargetError(
            f"{checkpoint}: another configuration than {bundle.path}; expected the checkpoint that was exported, "
            f"{bundle.manifest.source.checkpoint}"
        )
    return TorchRuntime(load_model(opened, DTYPES[bundle.manifest.dtype]), logits=bundle.manifest.logits)


def _float32(bundle: Bundle) -> Runtime:
    """The bundle's weights, as rounded for it, in a float32 model: what is left is the error of computing."""
    return TorchRuntime(load_model(bundle.checkpoint(), torch.float32), logits=bundle.manifest.logits)
