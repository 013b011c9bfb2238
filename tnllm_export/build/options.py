"""What a user may ask of a pair of engines, checked at the door."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tnllm_export.bundle.engines import ProfileRecord, WeightsMode
from tnllm_export.errors import EngineBuildError


@dataclass(frozen=True)
class EngineOptions:
    """How engines shall be built.

    Attributes:
        max_batch: Most sequences at once.
        max_prompt: Most tokens of one prefill; longer prompts are read in pieces.
        opt_batch: The batch that is made fastest.
        opt_prompt: The number of tokens that is made fastest; default: `max_prompt`.
        weights: "embedded" in each engine; "external": inputs of both engines, which then share one copy of the
            bundle's weights; "stripped": taken out by TensorRT and put back by a refit when the engine is loaded.
        compute_capabilities: Of the GPUs it shall run on, e.g. ("8.6", "12.0"); empty for the target's own choice.
        plugin_library: The library with our plugins, for bundles of the lowering `plugin`. Paths may be strings.
        embed_plugin: Whether the engines carry the library.
        tf32: Whether float32 products may round their factors to 10 bits for the tensor cores. States, and all of the
            lowering `matmul`'s attention, are float32: without it they keep the precision that other runtimes have.
        timing_cache: File that keeps measured times between builds (`tensorrt` only).
        device: "cpu" or "cuda" (`aotinductor` only, which takes no other option); default: "cuda" where there is one.
    """

    max_batch: int = 8
    max_prompt: int = 512
    opt_batch: int = 1
    opt_prompt: int | None = None
    weights: WeightsMode = "embedded"
    compute_capabilities: tuple[str, ...] = ()
    plugin_library: Path | None = None
    embed_plugin: bool = False
    tf32: bool = False
    timing_cache: Path | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("plugin_library", "timing_cache"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, Path(path))
        for kind, optimal, largest in (
            ("batch", self.opt_batch, self.max_batch),
            ("prompt", self.profile.opt_prompt, self.max_prompt),
        ):
            if not 1 <= largest < 2**31:  # TensorRT's sizes have 32 bits
                raise EngineBuildError(f"max-{kind} is {largest}; expected 1 … {2**31 - 1}")
            if not 1 <= optimal <= largest:
                raise EngineBuildError(f"opt-{kind} is {optimal}; expected 1 … {largest}, the max-{kind}")
        if self.weights not in get_args(WeightsMode):
            raise EngineBuildError(f"weights is {self.weights!r}; expected one of: {', '.join(get_args(WeightsMode))}")
        if self.embed_plugin and self.plugin_library is None:
            raise EngineBuildError("no plugin library to embed; name one with --plugin-library")

    @property
    def profile(self) -> ProfileRecord:
        """The shapes."""
        return ProfileRecord(
            max_batch=self.max_batch,
            opt_batch=self.opt_batch,
            max_prompt=self.max_prompt,
            opt_prompt=self.max_prompt if self.opt_prompt is None else self.opt_prompt,
        )


def parse_compute_capabilities(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Read compute capabilities written as 8.6 or 86; return them as "8.6", sorted, each once.

    Raises:
        EngineBuildError: One is no compute capability.
    """
    found = set()
    for text in texts:
        match = re.fullmatch(r"(\d{1,2})\.?(\d)", text.strip())
        if match is None:
            raise EngineBuildError(f"{text!r} is no compute capability; expected one like 8.6 or 86")
        found.add((int(match[1]), int(match[2])))
    return tuple(f"{major}.{minor}" for major, minor in sorted(found))


def resolve_compute_capabilities(trt: Any, texts: tuple[str, ...]) -> list[Any]:
    """Return TensorRT's own values for compute capabilities such as "8.6".

    Raises:
        EngineBuildError: One is not among those that this TensorRT can be asked to build for.
    """
    if not texts:
        return []
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise EngineBuildError(
            f"{trt.__name__} {trt.__version__} builds for the GPU it runs on and takes no compute capabilities; "
            "leave out --sm, or use --target tensorrt-rtx"
        )
    named = {name[2:-1] + "." + name[-1]: value for name, value in known.__members__.items() if name.startswith("SM")}
    unknown = [text for text in texts if text not in named]
    if unknown:
        raise EngineBuildError(
            f"{trt.__name__} {trt.__version__} does not build for compute capability {', '.join(unknown)}; "
            f"expected some of {', '.join(sorted(named, key=float))}, or --target tensorrt on such a GPU"
        )
    return [named[text] for text in texts]
