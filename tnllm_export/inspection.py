"""What is in a bundle, an ONNX file or a TensorRT engine, and what can run it; no weight is read."""
# ruff: noqa: PLC0415 - onnx is imported when there is a graph to read

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.bundle.engines import (
    ENGINE_SUFFIX,
    PACKAGE_SUFFIX,
    RECORD,
    EngineSet,
    engines_of,
    is_current,
    read_engines,
)
from tnllm_export.errors import BundleCorruptError, BundleNotFoundError
from tnllm_export.targets import TARGETS, Target
from tnllm_export.tensorrt import engine_target

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto

AI_ONNX = "ai.onnx"
"""The name of the default domain, which graphs write as ""."""

_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class OpCount:
    """How often an operator occurs, subgraphs and function bodies included."""

    domain: str
    op: str
    count: int


@dataclass(frozen=True)
class PortInfo:
    """An input or output. Symbolic dimensions have names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphInfo:
    """One ONNX file.

    Attributes:
        file: Its name.
        bytes: Its size, without external data.
        opset_imports: Version of each domain.
        inputs: Its inputs.
        outputs: Its outputs.
        ops: Operators with their counts, the most frequent first.
        functions: Model-local functions, as domain::name.
        parameters: Values in its initializers.
        weight_bytes: Bytes of its initializers, external ones included.
        external_files: Files that its weights are in.
        weight_dtype: The floating-point dtype that most parameters have; None without any.
    """

    file: str
    bytes: int
    opset_imports: dict[str, int]
    inputs: tuple[PortInfo, ...]
    outputs: tuple[PortInfo, ...]
    ops: tuple[OpCount, ...]
    functions: tuple[str, ...]
    parameters: int
    weight_bytes: int
    external_files: tuple[str, ...]
    weight_dtype: str | None


@dataclass(frozen=True)
class TargetVerdict:
    """Whether a target runs it; if not, each reason is a phrase."""

    target: str
    runs: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class EngineInfo:
    """A pair of TensorRT engines or AOTInductor packages in a bundle, prefill and decode.

    Attributes:
        path: Their folder.
        target: What runs them, e.g. "tensorrt-rtx".
        version: Of TensorRT, or of PyTorch.
        gpus: Where they run: compute capabilities, or the GPU or CPU they were built for.
        dtype: Of activations.
        lowering: Which form the two ops have.
        weights: "embedded", "external" or "stripped".
        profile: Largest and optimal batch, and prompt of one prefill; None where any will do.
        tf32: Whether float32 products may round their factors to 10 bits.
        plugin: None, or whether the plugin library is "embedded" or "beside" the engines.
        files: Size of each.
        current: Whether they were built from the graphs and weights that the bundle has now; None outside a bundle.
    """

    path: str
    target: str
    version: str
    gpus: str
    dtype: str
    lowering: str
    weights: str
    profile: dict[str, int] | None
    tf32: bool
    plugin: str | None
    files: dict[str, int]
    current: bool | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: What was inspected.
        kind: "bundle", "onnx" or "engine".
        dtype: Of activations.
        lowering: Which form the two ops have.
        parameters: Of the model.
        bytes: Size of all files together, weights included.
        graphs: The ONNX files.
        targets: What can run it.
        bundle: For a bundle: model, logits, tokenizer, tools, source, parity; else None.
        engines: The TensorRT engines.
    """

    path: str
    kind: str
    dtype: str | None
    lowering: str
    parameters: int
    bytes: int
    graphs: tuple[GraphInfo, ...]
    targets: tuple[TargetVerdict, ...]
    bundle: dict[str, Any] | None
    engines: tuple[EngineInfo, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it in types that JSON has."""
        return asdict(self)


def inspect(path: Path | str) -> Inspection:
    """Inspect a bundle's folder, a single `.onnx` file, or an engine that lies in a bundle.

    Raises:
        BundleNotFoundError: None of them is there.
        BundleCorruptError: The bundle is broken (sizes are checked, checksums are not), or the file is no ONNX.
        EngineMismatchError: An engine without the record that `tnllm build` writes beside it.
    """
    path = Path(path)
    if path.suffix in (ENGINE_SUFFIX, PACKAGE_SUFFIX) or (path / RECORD).is_file():
        return _inspect_engine(path)
    if path.is_dir():
        return _inspect_bundle(open_bundle(path, check=False))
    if not path.is_file():
        raise BundleNotFoundError(f"{path}: no such file; expected a bundle's folder or an .onnx file")
    graph = _read_graph(path)
    lowering = _guess_lowering(graph.ops)
    verdicts = tuple(_judge(target, graph.weight_dtype, lowering, [graph], bundle=False) for target in TARGETS)
    external = sum(_size(path.parent / name) for name in graph.external_files)
    size = graph.bytes + external
    return Inspection(str(path), "onnx", graph.weight_dtype, lowering, graph.parameters, size, (graph,), verdicts, None)


def _inspect_bundle(bundle: Bundle) -> Inspection:
    manifest = bundle.manifest
    graphs = (_read_graph(bundle.prefill_path), _read_graph(bundle.decode_path))
    return Inspection(
        path=str(bundle.path),
        kind="bundle",
        dtype=manifest.dtype,
        lowering=manifest.lowering,
        parameters=manifest.source.parameters,
        bytes=sum(record.bytes for record in manifest.files.values()),
        graphs=graphs,
        targets=tuple(_judge(target, manifest.dtype, manifest.lowering, graphs, bundle=True) for target in TARGETS),
        bundle=manifest.model_dump(mode="json", include={"config", "logits", "tokenizer", "tools", "source", "parity"}),
        engines=tuple(_engine(found, bundle) for found in engines_of(bundle.path)),
    )


def _inspect_engine(path: Path) -> Inspection:
    if not path.exists():
        raise BundleNotFoundError(f"{path}: no such file; expected an engine that `tnllm build` made")
    engines = _engine(read_engines(path if path.is_dir() else path.parent), None)
    return Inspection(
        path=str(path),
        kind="engine",
        dtype=engines.dtype,
        lowering=engines.lowering,
        parameters=0,
        bytes=path.stat().st_size if path.is_file() else sum(engines.files.values()),
        graphs=(),
        targets=(TargetVerdict(engines.target, True, ()),),
        bundle=None,
        engines=(engines,),
    )


def _engine(found: EngineSet, bundle: Bundle | None) -> EngineInfo:
    spec = found.spec
    gpus = spec.device or ", ".join(spec.compute_capabilities) or engine_target(spec.target).compute_capabilities
    return EngineInfo(
        path=str(found.path),
        target=spec.target,
        version=spec.version,
        gpus=gpus,
        dtype=spec.dtype,
        lowering=spec.lowering,
        weights=spec.weights,
        profile=None if spec.profile is None else spec.profile.model_dump(),
        tf32=spec.tf32,
        plugin=None if spec.plugin is None else "embedded" if spec.plugin.embedded else "beside",
        files={name: record.bytes for name, record in found.record.files.items()},
        current=None if bundle is None else is_current(found, bundle.manifest),
    )


def _judge(
    target: Target, dtype: str | None, lowering: str, graphs: Iterable[GraphInfo], *, bundle: bool
) -> TargetVerdict:
    """Hold a graph against what a target can run."""
    reasons = []
    if dtype is not None and dtype not in target.dtypes:
        reasons.append(f"dtype {dtype}; runs {', '.join(target.dtypes)}")
    if not target.lowerings and not bundle:
        reasons.append("runs a bundle's weights, no graphs")
    if target.lowerings:
        if lowering not in target.lowerings:
            reasons.append(f"lowering {lowering}; runs {', '.join(target.lowerings)}")
        opset = max((graph.opset_imports.get(AI_ONNX, 0) for graph in graphs), default=0)
        if target.max_opset is not None and opset > target.max_opset:
            reasons.append(f"opset {opset}; runs up to {target.max_opset}")
    return TargetVerdict(target.name, not reasons, tuple(reasons))


def _guess_lowering(ops: Iterable[OpCount]) -> str:
    """Tell the lowering from the operators; a graph of plain operators counts as matmul."""
    found = {(item.domain, item.op) for item in ops}
    if any(domain == "tnllm" for domain, _ in found):
        return "plugin"
    if ("com.microsoft", "LinearAttention") in found:
        return "contrib"
    return "standard" if (AI_ONNX, "LinearAttention") in found else "matmul"


def _read_graph(path: Path) -> GraphInfo:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        # Whatever its name: onnx would parse a file called .json or .txt as something else.
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise BundleCorruptError(f"{path}: no ONNX file ({error}); expected one that an exporter wrote") from error
    if not model.HasField("graph") or not model.opset_import:
        raise BundleCorruptError(f"{path}: no ONNX file (it has no graph or no opset); expected one from an exporter")
    tensors = list(model.graph.initializer)
    values: Counter[str] = Counter()
    for tensor in tensors:
        values[_dtype_name(tensor.data_type)] += prod(tensor.dims)
    floats = {name: values[name] for name in _FLOATS if values[name]}
    initializers = {tensor.name for tensor in tensors}
    counts = Counter(_ops(model))
    return GraphInfo(
        file=path.name,
        bytes=path.stat().st_size,
        opset_imports={item.domain or AI_ONNX: item.version for item in model.opset_import},
        inputs=tuple(_port(value) for value in model.graph.input if value.name not in initializers),
        outputs=tuple(_port(value) for value in model.graph.output),
        ops=tuple(OpCount(domain, op, count) for (domain, op), count in sorted(counts.items(), key=_frequent_first)),
        functions=tuple(f"{function.domain}::{function.name}" for function in model.functions),
        parameters=sum(values.values()),
        weight_bytes=sum(map(_tensor_bytes, tensors)),
        external_files=tuple(sorted({name for tensor in tensors if (name := _external_file(tensor))})),
        weight_dtype=max(floats, key=floats.__getitem__) if floats else None,
    )


def _frequent_first(item: tuple[tuple[str, str], int]) -> tuple[int, tuple[str, str]]:
    return -item[1], item[0]


def _ops(model: "ModelProto") -> Iterable[tuple[str, str]]:
    bodies: list[Any] = [model.graph.node, *(function.node for function in model.functions)]
    while bodies:
        for node in bodies.pop():
            yield node.domain or AI_ONNX, node.op_type
            bodies += [graph.node for attribute in node.attribute for graph in _subgraphs(attribute)]


def _subgraphs(attribute: "AttributeProto") -> Iterable["GraphProto"]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _port(value: "ValueInfoProto") -> PortInfo:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return PortInfo(value.name, _dtype_name(tensor.elem_type), shape)


def _dtype_name(elem_type: int) -> str:
    from onnx import TensorProto

    # ONNX calls float32 FLOAT and float64 DOUBLE; people know them by their width.
    name = str(TensorProto.DataType.Name(elem_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _tensor_bytes(tensor: "TensorProto") -> int:
    from onnx import helper

    if tensor.dims and not prod(tensor.dims):
        return 0
    return int(prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _external_file(tensor: "TensorProto") -> str | None:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
