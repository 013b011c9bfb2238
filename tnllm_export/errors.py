"""The exception tree. A message says what was found, what was expected and what to do; each leaf has an exit code.

The tree:

    TnllmError
    ├── CheckpointError          the model that goes in
    │   ├── CheckpointNotFoundError
    │   ├── ConfigError
    │   ├── WeightsMismatchError     missing, extra or mis-shaped tensors
    │   ├── WeightsUnreadableError   truncated or foreign files
    │   ├── UnsafePickleError
    │   ├── NonFiniteWeightsError
    │   └── TokenizerError
    ├── BundleError              what export writes and everything else reads
    │   ├── BundleNotFoundError
    │   ├── BundleExistsError
    │   ├── BundleCorruptError
    │   └── BundleVersionError
    ├── ExportError              a graph could not be made
    ├── WriteError               disk full, no permission, something else in the place
    ├── EngineError              TensorRT engines and the plugin library
    │   ├── EngineBuildError         options that do not fit, or TensorRT refused the network
    │   ├── PluginBuildError         no compiler, no headers, or the library did not compile
    │   ├── EngineMissingError       no engine was built for what is asked
    │   └── EngineMismatchError      corrupt, of another version, or not for this GPU
    ├── RuntimeTargetError       a bundle and the runtime it shall run on
    │   ├── RuntimeMissingError      the optional dependency is not installed
    │   ├── UnsupportedTargetError   dtype, lowering, kernels or device that the runtime does not run
    │   └── DeviceMemoryError        the GPU's memory does not suffice
    ├── RequestError             what is asked of a loaded model
    │   ├── PromptError              empty, too long, token id out of range
    │   ├── TextUnsupportedError     text for a model without a tokenizer
    │   ├── SamplingError
    │   ├── StateError               a state of another model, batch or shape
    │   └── ProfileError             a batch or prompt that the engines were not built for
    ├── ParityError              a runtime disagrees with the eager model
    └── CorpusError              text to train on is missing, broken or too short
"""


class TnllmError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class TnllmWarning(UserWarning):
    """Something was ignored or is missing; the work goes on. Said once."""


class CheckpointError(TnllmError):
    """A checkpoint folder can't be used."""

    exit_code = 10


class CheckpointNotFoundError(CheckpointError):
    """The folder, or a file in it that every checkpoint has, does not exist."""

    exit_code = 11


class ConfigError(CheckpointError):
    """`config.json` is broken, or asks for something that does not exist."""

    exit_code = 12


class WeightsMismatchError(CheckpointError):
    """Tensors are missing, extra or mis-shaped; the message lists them by name."""

    exit_code = 13


class WeightsUnreadableError(CheckpointError):
    """A weights file is truncated or is not what its name says."""

    exit_code = 14


class UnsafePickleError(CheckpointError):
    """A `.bin` file holds objects other than tensors; it is not loaded."""

    exit_code = 15


class NonFiniteWeightsError(CheckpointError):
    """A weight is NaN or infinite."""

    exit_code = 16


class TokenizerError(CheckpointError):
    """The tokenizer is broken or does not fit the model's vocabulary."""

    exit_code = 17


class BundleError(TnllmError):
    """A bundle can't be used."""

    exit_code = 20


class BundleNotFoundError(BundleError):
    """There is no bundle at this path."""

    exit_code = 21


class BundleExistsError(BundleError):
    """The output path exists and overwriting was not asked for."""

    exit_code = 22


class BundleCorruptError(BundleError):
    """A file of the bundle is missing or differs from its checksum, or the manifest is broken."""

    exit_code = 23


class BundleVersionError(BundleError):
    """The manifest was written by a newer version of this package."""

    exit_code = 24


class ExportError(TnllmError):
    """A program could not be traced or a graph could not be made."""

    exit_code = 30


class WriteError(TnllmError):
    """A file could not be written: disk full, no permission, or something else is in its place."""

    exit_code = 31


class EngineError(TnllmError):
    """An engine or the plugin library can't be made or used."""

    exit_code = 32


class EngineBuildError(EngineError):
    """An engine's options do not fit, or TensorRT refused to build it."""

    exit_code = 33


class PluginBuildError(EngineError):
    """The plugin library could not be made: no compiler, no headers, or it did not compile."""

    exit_code = 34


class EngineMissingError(EngineError):
    """The bundle holds no engine that fits what is asked."""

    exit_code = 35


class EngineMismatchError(EngineError):
    """An engine is corrupt, of another version of TensorRT, or not for this GPU."""

    exit_code = 36


class RuntimeTargetError(TnllmError):
    """A bundle does not run on the runtime that was asked for."""

    exit_code = 40


class RuntimeMissingError(RuntimeTargetError):
    """The runtime is unknown or its package is not installed."""

    exit_code = 41


class UnsupportedTargetError(RuntimeTargetError):
    """The runtime can't run this dtype, lowering or form of kernels, or not on this device."""

    exit_code = 42


class DeviceMemoryError(RuntimeTargetError):
    """The GPU's memory does not suffice. Nothing was changed: states that the caller holds are usable."""

    exit_code = 43


class RequestError(TnllmError):
    """What is asked of a loaded model can't be done."""

    exit_code = 50


class PromptError(RequestError):
    """The prompt is empty or too long, or holds a token id outside the vocabulary."""

    exit_code = 51


class TextUnsupportedError(RequestError):
    """Text was given to a model that has no tokenizer."""

    exit_code = 52


class SamplingError(RequestError):
    """A sampling parameter is out of its range or of another type."""

    exit_code = 53


class StateError(RequestError):
    """A recurrent state does not fit: another model, batch size, shape or dtype."""

    exit_code = 54


class ProfileError(RequestError):
    """The batch or the prompt is larger than the engines were built for."""

    exit_code = 55


class ParityError(TnllmError):
    """A runtime's answers differ from the eager model's by more than the tolerance."""

    exit_code = 60


class CorpusError(TnllmError):
    """The training text is missing, broken or too short, or its reader is not installed."""

    exit_code = 61
