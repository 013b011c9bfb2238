"""How the demo model is trained, and what came of it."""

from dataclasses import dataclass
from pathlib import Path

from tnllm_export.models.config import TransnormerConfig


@dataclass(frozen=True)
class TrainingSettings:
    """Model and training. The defaults made the checkpoint that the package ships.

    Attributes:
        vocab_size: Most pieces that the tokenizer may have.
        width: Hidden width d.
        heads: Heads H; divides d.
        layers: Layers L.
        glu_width: Inner width of SGLU.
        steps: Optimiser steps; the learning rate falls to 0 over them.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
        learning_rate: The highest, after `warmup_steps`.
        warmup_steps: Steps over which the learning rate rises from 0.
        weight_decay: Decoupled, of every matrix.
        gradient_clip: Largest norm of the whole gradient.
        dropout: Rate on the embedding and on what each layer's two halves add to the residual stream.
        segmentation_rate: Share of words whose segmentation is drawn anew in each epoch; falls to 0 over the steps.
        segmentation_alpha: Exponent of the segmentations' probabilities; the smaller, the wilder.
        average_decay: Decay per step of the averaged weights, which are the ones validated and kept.
        held_out: Share of each novel's chapters, its last ones, that validates.
        validate_every: Steps between validations.
        seed: Of initialisation, order, dropout and segmentations.
        time_limit_s: Seconds after which training must have ended: the schedule then follows the clock where that is
            ahead of the steps, and the result depends on the machine's speed.
    """

    vocab_size: int = 4096
    width: int = 240
    heads: int = 5
    layers: int = 5
    glu_width: int = 640
    steps: int = 6000
    batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.3
    gradient_clip: float = 1.0
    dropout: float = 0.2
    segmentation_rate: float = 1.0
    segmentation_alpha: float = 0.2
    average_decay: float = 0.995
    held_out: float = 0.05
    validate_every: int = 250
    seed: int = 0
    time_limit_s: float | None = None

    def model_config(self, vocab_size: int) -> TransnormerConfig:
        """Return the released form at this size; the tokenizer decides `vocab_size`."""
        return TransnormerConfig(
            vocab_size=vocab_size,
            decoder_embed_dim=self.width,
            hidden_dim=self.width,
            decoder_layers=self.layers,
            decoder_attention_heads=self.heads,
            glu_dim=self.glu_width,
        )


@dataclass(frozen=True)
class Evaluation:
    """How well text was predicted: the mean negative log likelihood, in three units that compare differently.

    Attributes:
        perplexity: Per token; depends on the tokenizer.
        word_perplexity: Per word between spaces.
        bits_per_character: Independent of any segmentation.
        tokens: Predicted tokens.
    """

    perplexity: float
    word_perplexity: float
    bits_per_character: float
    tokens: int


@dataclass(frozen=True)
class CurvePoint:
    """One validation during training. Losses are nats per token; the training loss is the mean since the last point."""

    step: int
    training_loss: float
    validation_loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """What `train` wrote: `validation` is measured on the weights as stored, in bfloat16."""

    folder: Path
    validation: Evaluation
    parameters: int
    best_step: int
    seconds: float
    curve: tuple[CurvePoint, ...]
