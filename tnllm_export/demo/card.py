"""The model card and the plot of the loss, made from what training measured and from nothing else."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnllm_export.demo.settings import TrainingSettings


def write_card(folder: Path) -> None:
    """Write README.md and loss.png of a checkpoint folder from its training.json."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(card_text(record), encoding="utf-8")
    plot_losses(record["curve"], record["best_step"], folder / "loss.png")


def card_text(record: dict[str, Any]) -> str:
    """Return the model card in Markdown."""
    model, corpus, validation = record["model"], record["corpus"], record["validation"]
    settings = "\n".join(f"| {name} | {value} |" for name, value in record["settings"].items() if value is not None)
    samples = "\n\n".join(_quoted(sample["prompt"], sample["text"]) for sample in record["samples"])
    width, heads = model["decoder_embed_dim"], model["decoder_attention_heads"]
    return f"""\
# A small TransNormerLLM that writes like its novels

A language model of {record["parameters"]:,} parameters in the released TransNormerLLM form, to try `tnllm` on: real
weights and a real tokenizer in {_megabytes(record)} MB. It continues prose in the manner of its training text. It knows
nothing else, follows no instructions, and what it says about people is fiction of two hundred years ago.

| | |
|---|---|
| Training text | {corpus["source"]} |
| Licence of the text | {corpus["licence"]} |
| Licence of the weights | Apache-2.0, as this package |
| Training command | `{_command(record)}` |
| Validation perplexity | **{validation["perplexity"]:.2f}** per token |
| | {validation["word_perplexity"]:.1f} per word, {validation["bits_per_character"]:.3f} bits per character |
| Form | {model["decoder_layers"]} layers, width {width}, {heads} heads of {width // heads}, SGLU {model["glu_dim"]} |
| Position encoding | LRPE in layer 0 alone, as released |
| Vocabulary | {model["vocab_size"]} pieces, SentencePiece unigram with byte fallback |
| Weights | bfloat16 (LRPE's theta float32), head tied to the embedding |

Validation is on the last {corpus["validation_chapters"]} of {corpus["chapters"]} chapters (the end of each novel, \
{validation["tokens"]:,} tokens), which were not
trained on; each is read from its start to its end. The weights kept are those of the validated step with the lowest
loss, and the default settings were chosen by this loss too, so that the figure is slightly kind. It was measured on the
weights as stored, computed in float32.

## Training

![Loss over training steps](loss.png)

{record["steps"]:,} steps on {record["environment"]["device"]} in {record["seconds"]:.0f} s with torch \
{record["environment"]["torch"]}; the best validation loss came at step {record["best_step"]:,}.
Against learning {corpus["training_tokens"]:,} tokens by heart: dropout, weight decay, words segmented anew in each
epoch, averaged weights. Every figure here is from `training.json`.

| setting | value |
|---|---|
{settings}

## What it writes

Temperature {record["sampling"]["temperature"]}, top-p {record["sampling"]["top_p"]}, seed 0; the prompts are in bold.

{samples}
"""


def plot_losses(curve: list[dict[str, float]], best_step: int, path: Path) -> None:
    """Draw training and validation loss, in nats per token, over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [point["step"] for point in curve]
    axes.plot(steps, [point["training_loss"] for point in curve], label="training (dropout, sampled segmentation)")
    axes.plot(steps, [point["validation_loss"] for point in curve], label="validation (averaged weights)")
    axes.axvline(best_step, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _command(record: dict[str, Any]) -> str:
    """Return what makes this checkpoint again: the command, or a call where settings have no option."""
    defaults = asdict(TrainingSettings())
    changed = {name: value for name, value in record["settings"].items() if value != defaults.get(name)}
    corpus = record["corpus"]["path"]
    if set(changed) <= {"steps", "seed"}:
        options = "".join(f" --{name} {value}" for name, value in changed.items())
        return f"tnllm train-demo --corpus {corpus} -o FOLDER{options}"
    arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return f'train(Path("{corpus}"), Path("FOLDER"), settings=TrainingSettings({arguments}))'


def _megabytes(record: dict[str, Any]) -> str:
    return f"{record['bytes'] / 1e6:.1f}"


def _quoted(prompt: str, text: str) -> str:
    """Return a sample as a Markdown quotation, its prompt in bold."""
    marked = f"**{prompt}**{text.removeprefix(prompt)}"
    return "\n".join(f"> {line}".rstrip() for line in marked.splitlines())
