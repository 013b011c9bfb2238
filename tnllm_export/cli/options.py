"""Arguments and options that several verbs share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Of weights and activations."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Lowering(StrEnum):
    """Which form the two ops have in the graphs."""

    CONTRIB = "contrib"
    STANDARD = "standard"
    MATMUL = "matmul"
    PLUGIN = "plugin"
    HYBRID = "hybrid"


class Logits(StrEnum):
    """Which logits a prefill returns."""

    LAST = "last"
    ALL = "all"


class RuntimeName(StrEnum):
    """What runs a bundle."""

    ONNXRUNTIME = "onnxruntime"
    TORCH = "torch"
    AOTINDUCTOR = "aotinductor"
    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


class DeviceName(StrEnum):
    """What a runtime runs on."""

    CPU = "cpu"
    CUDA = "cuda"


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `tnllm export` made.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document, errors included.")]
RuntimeOption = Annotated[RuntimeName, typer.Option("--runtime", help="What runs the bundle.")]
DeviceOption = Annotated[DeviceName | None, typer.Option("--device", help="Default: the runtime's first.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads, at most 64 or four times the cores. Default: the runtime's."),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Of weights and activations. Default: the checkpoint's, where ONNX Runtime runs it."),
]
LoweringOption = Annotated[
    Lowering | None,
    typer.Option("--lowering", help="Form of the attention ops in the graphs. Default: the one for ONNX Runtime."),
]
LogitsOption = Annotated[Logits, typer.Option("--logits", help="Logits of the last prompt token, or of all.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there already.")]
