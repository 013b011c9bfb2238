"""The demo checkpoint that the package ships, and its training."""

from importlib.resources import files
from pathlib import Path

from tnllm_export.demo.settings import Evaluation, TrainingResult, TrainingSettings
from tnllm_export.demo.train import train

__all__ = ["Evaluation", "TrainingResult", "TrainingSettings", "checkpoint_folder", "train"]


def checkpoint_folder() -> Path:
    """Return the folder of the demo checkpoint; the package is installed as files, never as a zip archive."""
    return Path(str(files(__package__) / "checkpoint"))
