"""Trains the demo checkpoint: the text, a tokenizer, a small TransNormerLLM, its folder and its model card."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tnllm_export.demo.card import write_card
from tnllm_export.demo.corpus import Corpus, read_corpus
from tnllm_export.demo.evaluate import continue_text, evaluate
from tnllm_export.demo.folder import new_folder, write_checkpoint, write_json
from tnllm_export.demo.loop import Trainer
from tnllm_export.demo.settings import TrainingResult, TrainingSettings
from tnllm_export.demo.tokenizer import Segmenter, load_tokenizer, train_tokenizer
from tnllm_export.errors import UnsupportedTargetError
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime.support import check_kernels

PROMPTS = (
    "It was a fine morning in May, and",
    '"I am very glad that you are come," said',
    "Captain Wentworth entered the room, and Anne",
    "Elizabeth had never in her life",
)
"""What the texts on the model card begin with; none of them is a line of the novels."""

SAMPLING: dict[str, Any] = {"tokens": 120, "temperature": 0.8, "top_p": 0.9}
"""How the texts on the model card are drawn."""


def train(
    corpus: Path | None,
    output: Path,
    *,
    settings: TrainingSettings | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> TrainingResult:
    """Train a demo checkpoint and write its folder.

    On a CPU the same settings give the same weights bit for bit; on CUDA they differ in rounding.

    Args:
        corpus: See `read_corpus`; None is where Debian installs the novels.
        output: Folder to make: config.json, model.safetensors (bfloat16), tokenizer.model, README.md (the model
            card), loss.png, training.json. Written beside it first and renamed when complete.
        settings: Default: those that made the shipped checkpoint, `TrainingSettings()`.
        device: "cpu", "cuda", "cuda:1" …; default: CUDA where there is a device.
        progress: Told about stages and steps.

    Raises:
        CorpusError: The text is missing or too short.
        WriteError: `output` exists, or can't be written.
        UnsupportedTargetError: The device does not exist, or can't run the kernels that `TNLLM_KERNELS` asks for.
        RequestError: Training diverged.
    """
    place = _device(device)
    for used in (place, torch.device("cpu")):  # the result is evaluated on the CPU
        check_kernels(used)
    with new_folder(output) as folder:
        return _train_into(folder, output, corpus, settings or TrainingSettings(), place, progress)


def _train_into(
    folder: Path,
    output: Path,
    corpus: Path | None,
    settings: TrainingSettings,
    device: torch.device,
    progress: Progress,
) -> TrainingResult:
    """Do the work of `train` in a folder that is empty so far."""
    progress("reading the corpus", 0, 1)
    text = read_corpus(corpus)
    training, validation = text.split(settings.held_out)
    progress("reading the corpus", 1, 1)
    progress("training the tokenizer", 0, 1)
    tokenizer_model = train_tokenizer(training, settings.vocab_size)
    tokenizer = load_tokenizer(tokenizer_model)
    segmenter = Segmenter(tokenizer, training)
    progress("training the tokenizer", 1, 1)
    trainer = Trainer(settings, tokenizer, segmenter, validation, device)
    trainer.run(progress)
    progress("writing the checkpoint", 0, 1)
    model = write_checkpoint(folder, trainer.best, tokenizer_model)
    result = TrainingResult(
        folder=output,
        validation=evaluate(model, tokenizer, validation),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        best_step=trainer.best_step,
        seconds=trainer.seconds,
        curve=tuple(trainer.curve),
    )
    record = {
        "settings": asdict(settings),
        "model": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        "parameters": result.parameters,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "corpus": _corpus_record(text, training, validation) | {"training_tokens": len(segmenter.encode())},
        "environment": {"torch": torch.__version__, "device": _device_name(device)},
        "validation": asdict(result.validation),
        "steps": trainer.curve[-1].step,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "sampling": SAMPLING,
        "samples": [{"prompt": p, "text": continue_text(model, tokenizer, p, seed=0, **SAMPLING)} for p in PROMPTS],
        "curve": [asdict(point) for point in result.curve],
    }
    write_json(folder / "training.json", record)
    write_card(folder)
    progress("writing the checkpoint", 1, 1)
    return result


def _corpus_record(text: Corpus, training: list[str], validation: list[str]) -> dict[str, Any]:
    return {
        "source": text.source,
        "licence": text.licence,
        "path": text.path,
        "novels": [novel.title for novel in text.novels],
        "chapters": len(training) + len(validation),
        "validation_chapters": len(validation),
        "words": sum(len(chapter.split()) for chapter in [*training, *validation]),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedTargetError(f"device is {name!r}; expected cpu, cuda or cuda:N that exists here") from error
    return device
