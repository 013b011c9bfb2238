"""Generation on top of any runtime."""

from tnllm_export.generate.generator import Generator
from tnllm_export.generate.params import SamplingParams
from tnllm_export.generate.prompts import Prompt
from tnllm_export.generate.sequence import Event, FinishReason, Generation
from tnllm_export.generate.session import Session, check_state_path, load_state, save_state

__all__ = [
    "Event",
    "FinishReason",
    "Generation",
    "Generator",
    "Prompt",
    "SamplingParams",
    "Session",
    "check_state_path",
    "load_state",
    "save_state",
]
