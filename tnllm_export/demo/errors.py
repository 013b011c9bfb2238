"""What can go wrong with the training text."""

from tnllm_export.errors import TnllmError


class CorpusError(TnllmError):
    """The training text is missing, broken or too short, or its reader is not installed."""

    exit_code = 70
