"""A sequence that can be put aside and continued: its state, its tokens and its random numbers, in one file."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tnllm_export.bundle import files
from tnllm_export.bundle.outputs import check_output
from tnllm_export.errors import StateError
from tnllm_export.runtime import Runtime, RuntimeInfo
from tnllm_export.runtime.state import check_state_tensors

SCHEMA_VERSION = 1
_FORMAT = "tnllm-state"


@dataclass(frozen=True, eq=False)
class Session:
    """One sequence, stopped. Continued with the same parameters it goes on as if it had never been stopped.

    Attributes:
        token_ids: All tokens so far, prompt included.
        state: One tensor [1, H, K, V] per layer.
        logits: [vocab] that the next token is chosen from; None where the last of `token_ids` was chosen already but
            has not been fed to the model.
        seed: Seed of the sequence's random numbers.
        rng: Where these stand. A continuation with another seed starts that one afresh.
    """

    token_ids: tuple[int, ...]
    state: tuple[Tensor, ...] = field(repr=False)
    logits: Tensor | None = field(repr=False)
    seed: int
    rng: Tensor = field(repr=False)

    @property
    def position(self) -> int:
        """Number of tokens that are in the state."""
        return len(self.token_ids) - (self.logits is None)


def check_state_path(path: Path | str) -> None:
    """Raise WriteError unless `save_state` may write here: nothing is there, or a saved state, and not in a bundle."""
    check_output(Path(path), "a saved state", _is_state)


def save_state(path: Path | str, session: Session, runtime: Runtime) -> None:
    """Write a session to a safetensors file. An earlier state is replaced, whole or not at all; nothing else is.

    Raises:
        WriteError: The file can't be written, or something other than a saved state is there.
    """
    path = Path(path)
    check_state_path(path)
    tensors = {f"state.{layer}": tensor.contiguous() for layer, tensor in enumerate(session.state)}
    tensors["token_ids"] = torch.tensor(session.token_ids, dtype=torch.int64)
    tensors["rng"] = session.rng
    if session.logits is not None:
        tensors["logits"] = session.logits.contiguous()
    metadata = {
        "format": _FORMAT,
        "schema_version": str(SCHEMA_VERSION),
        "position": str(session.position),
        "seed": str(session.seed),
        **_model_identity(runtime.info),
    }
    with files.reporting_write_errors(path):
        files.replace(path, save(tensors, metadata))


def load_state(path: Path | str, runtime: Runtime) -> Session:
    """Read a session that `save_state` wrote, for the same weights (the runtime may be another).

    Raises:
        StateError: No such file, no state file, or a state of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise StateError(f"{path}: no such file; expected a state written by save_state")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no dict
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path}: not a readable state file ({error}); write it again with save_state") from error
    if metadata.get("format") != _FORMAT:
        raise StateError(f"{path}: a safetensors file, but no saved state; expected one written by save_state")
    if metadata.get("schema_version") != str(SCHEMA_VERSION):
        raise StateError(
            f"{path}: schema version is {metadata.get('schema_version')}; expected {SCHEMA_VERSION}: "
            "use the version of tnllm-export that wrote it"
        )
    try:
        _check_model(metadata, runtime.info)
        return _session(metadata, tensors, runtime.info)
    except StateError as error:
        raise StateError(f"{path}: {error}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise StateError(f"{path}: incomplete state file ({error!r}); write it again with save_state") from error


def check_session(session: Session, info: RuntimeInfo) -> None:
    """Raise StateError unless the session's state and tokens fit the model."""
    dtype = torch.float64 if info.dtype == "float64" else torch.float32
    check_state_tensors(info.config, session.state, dtype)
    vocab = info.config.vocab_size
    if session.logits is not None and session.logits.shape != (vocab,):
        raise StateError(f"logits have shape {list(session.logits.shape)}; expected [{vocab}]")
    if any(not 0 <= token < vocab for token in session.token_ids):
        raise StateError(f"the state holds a token id outside the vocabulary; expected 0 … {vocab - 1}")
    try:
        torch.Generator().set_state(session.rng)
    except (RuntimeError, TypeError) as error:
        raise StateError(
            "rng is no state of a random generator; expected what torch.Generator.get_state gives"
        ) from error
    if session.state[0].shape[0] != 1:
        raise StateError(f"the state holds {session.state[0].shape[0]} sequences; expected 1 per session")


def _is_state(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def _session(metadata: dict[str, str], tensors: dict[str, Tensor], info: RuntimeInfo) -> Session:
    session = Session(
        token_ids=tuple(tensors["token_ids"].tolist()),
        state=tuple(tensors[f"state.{layer}"] for layer in range(info.config.decoder_layers)),
        logits=tensors.get("logits"),
        seed=int(metadata["seed"]),
        rng=tensors["rng"],
    )
    check_session(session, info)
    if session.position != int(metadata["position"]):
        raise StateError(f"position is {metadata['position']}; expected {session.position}, as many as it has tokens")
    return session


def _model_identity(info: RuntimeInfo) -> dict[str, str]:
    return {"config": info.config.model_dump_json(), "dtype": info.dtype, "weights_id": info.weights_id}


def _check_model(metadata: dict[str, str], info: RuntimeInfo) -> None:
    """Raise StateError, naming the first difference, unless the file was written for the weights that are loaded."""
    found, expected = json.loads(metadata["config"]), json.loads(info.config.model_dump_json())
    for name, value in expected.items():
        if found.get(name) != value:
            raise StateError(f"state of another model: {name} is {found.get(name)}; expected {value}")
    if metadata["dtype"] != info.dtype:
        raise StateError(f"state of a {metadata['dtype']} model; expected {info.dtype}, the dtype that is loaded")
    if metadata["weights_id"] != info.weights_id:
        raise StateError(
            f"state of other weights ({metadata['weights_id'][:12] or 'none on disk'}); expected "
            f"{info.weights_id[:12] or 'none on disk'}: load the bundle that wrote it"
        )
