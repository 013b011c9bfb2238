"""The training loop: AdamW, cosine schedule, averaged weights, validation on whole chapters."""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tnllm_export.demo.evaluate import evaluate
from tnllm_export.demo.regularisation import dropout, update_average
from tnllm_export.demo.settings import CurvePoint, TrainingSettings
from tnllm_export.demo.tokenizer import Segmenter
from tnllm_export.errors import RequestError
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import Progress


class Trainer:
    """The loop: one model, its averaged copy, the best average so far, and the loss curve."""

    def __init__(
        self,
        settings: TrainingSettings,
        tokenizer: sentencepiece.SentencePieceProcessor,
        segmenter: Segmenter,
        validation: Sequence[str],
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.segmenter = segmenter
        self.validation = validation
        self.device = device
        torch.manual_seed(settings.seed)
        self.model = TransnormerForCausalLM(settings.model_config(tokenizer.get_piece_size()))
        _scale_residual_outputs(self.model)
        self.model.to(device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.best = copy.deepcopy(self.average)
        self.best_loss, self.best_step = math.inf, 0
        self.optimizer = _optimizer(self.model, settings)
        self.curve: list[CurvePoint] = []
        self.seconds = 0.0
        self.share = 0.0  # of the schedule that is done

    def run(self, progress: Progress) -> None:
        """Train to the end of the schedule."""
        settings, started = self.settings, time.perf_counter()
        losses = torch.zeros((), device=self.device)
        step = validated = 0
        batches = self._batches()
        with dropout(self.model, settings.dropout), _fast_matmul():
            while self.share < 1:
                learning_rate = self._set_learning_rate(step)
                losses += self._step(next(batches), step)
                step += 1
                self.seconds = time.perf_counter() - started
                self.share = step / settings.steps
                if settings.time_limit_s is not None:
                    self.share = max(self.share, self.seconds / settings.time_limit_s)
                if step % settings.validate_every == 0 or self.share >= 1:
                    self._validate(step, losses.item() / (step - validated), learning_rate)
                    losses.zero_()
                    validated = step
                if step % 10 == 0 or self.share >= 1:
                    progress("training", round(min(self.share, 1) * settings.steps), settings.steps, "steps")

    def _batches(self) -> Iterator[Tensor]:
        """Yield token ids [B, T + 1], each epoch's in another order, cut at another offset and segmented anew."""
        B, T = self.settings.batch_size, self.settings.sequence_length
        generator = np.random.default_rng(self.settings.seed)
        while True:
            rate = self.settings.segmentation_rate * (1 - self.share)
            sampled = self.segmenter.sample(generator, rate, self.settings.segmentation_alpha)
            # A text shorter than one batch is read round and round.
            stream = torch.from_numpy(np.resize(sampled, max(len(sampled), B * T + T + 1))).to(self.device).long()
            starts = np.arange(generator.integers(T), len(stream) - T, T)
            generator.shuffle(starts)
            for first in range(0, len(starts) - B + 1, B):
                begin = torch.from_numpy(starts[first : first + B]).to(self.device)
                yield stream[begin[:, None] + torch.arange(T + 1, device=self.device)]

    def _step(self, tokens: Tensor, step: int) -> Tensor:
        """Take one optimiser step on tokens [B, T + 1]; return the loss, on the device."""
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, _ = self.model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # The average of few steps is of few steps: the first ones shall not linger.
        update_average(self.average, self.model, min(self.settings.average_decay, (step + 1) / (step + 10)))
        return loss.detach()

    def _set_learning_rate(self, step: int) -> float:
        """Rise linearly, then fall along a cosine to 0."""
        rising = min(1.0, (step + 1) / self.settings.warmup_steps)
        rate = self.settings.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * self.share))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _validate(self, step: int, training_loss: float, learning_rate: float) -> None:
        if not math.isfinite(training_loss):
            raise RequestError(
                f"training diverged before step {step}: the loss is {training_loss}; lower learning_rate"
            )
        loss = math.log(evaluate(self.average, self.tokenizer, self.validation).perplexity)
        self.curve.append(CurvePoint(step, training_loss, loss, learning_rate, self.seconds))
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self.best.load_state_dict(self.average.state_dict())


def _scale_residual_outputs(model: TransnormerForCausalLM) -> None:
    """Shrink what each layer first adds to the residual stream, so that the sum over layers keeps its size."""
    factor = (2 * model.config.decoder_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".out_proj.weight", ".l3.weight")):
                parameter.mul_(factor)


def _optimizer(model: TransnormerForCausalLM, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return AdamW; theta and the other vectors don't decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


@contextmanager
def _fast_matmul() -> Iterator[None]:
    """Let CUDA round the factors of float32 products to TF32 within the context; a CPU computes as ever."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
