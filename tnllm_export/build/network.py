"""From a bundle's graph to a strongly typed TensorRT network."""
# ruff: noqa: PLC0415 - onnx is imported when there is a graph to read

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnllm_export.bundle.engines import ProfileRecord
from tnllm_export.errors import EngineBuildError
from tnllm_export.kernels.contract import NAMESPACE
from tnllm_export.tensorrt import last_error, logger

if TYPE_CHECKING:
    from onnx import ModelProto

BATCH, TIME = "batch", "time"
"""Names of the graphs' symbolic dimensions."""


def read_graph(path: Path) -> "ModelProto":
    """Read a graph as TensorRT shall see it, without its weights.

    Function bodies are left out: TensorRT would import them instead of the plugin of the same name.
    """
    import onnx

    model: ModelProto = onnx.load(str(path), load_external_data=False)
    del model.functions[:]
    return model


def make_weights_inputs(model: "ModelProto") -> frozenset[str]:
    """Make an input of every initializer that is stored outside the graph's file; return their names."""
    from onnx import helper

    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    inside = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    for tensor in outside:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(inside)
    return frozenset(tensor.name for tensor in outside)


def plugin_nodes(model: "ModelProto") -> int:
    """Count the nodes that only a plugin can run."""
    return sum(node.domain == NAMESPACE for node in model.graph.node)


def parse_network(trt: Any, builder: Any, model: "ModelProto", path: Path) -> Any:
    """Make a network of a graph; its weights are read from the file that stands beside `path`.

    Raises:
        EngineBuildError: TensorRT does not take the graph.
    """
    # TensorRT 11 has no other kind of network, and no such flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger(trt))
    # The path has to be absolute: external data is looked for beside it.
    if not parser.parse(model.SerializeToString(), str(path.resolve())):
        reasons = {" ".join(parser.get_error(place).desc().split()) for place in range(parser.num_errors)}
        last_error(trt)
        raise EngineBuildError(
            f"{path}: {trt.__name__} {trt.__version__} does not take the graph ({'; '.join(sorted(reasons))}); "
            "export again with --lowering matmul, or build with another version"
        )
    expected = plugin_nodes(model)
    found = sum(network.get_layer(place).type == trt.LayerType.PLUGIN_V3 for place in range(network.num_layers))
    if found != expected:
        raise EngineBuildError(
            f"{path}: the network has {found} plugin layers; expected {expected}, one per model layer"
        )
    return network


def put_placeholders(trt: Any, network: Any, names: Collection[str]) -> None:
    """Put a constant of no content, named like it, in the place of each of the inputs `names`.

    With STRIP_PLAN and REFIT_INDIVIDUAL this makes an engine that is refitted with weights of these names. Real weights
    would do the same, but TensorRT-RTX computes with those while it builds, and only on a GPU.

    Raises:
        EngineBuildError: This TensorRT knows no constants without content.
    """
    ports = [network.get_input(place) for place in range(network.num_inputs)]
    constants = {}
    for port in ports:
        if port.name in names:
            shape = tuple(port.shape)
            constant = network.add_constant(shape, trt.Weights(port.dtype, 0, math.prod(shape)))
            # The name belongs to the layer's own weights: TensorRT has given them an address.
            if constant is None or not network.set_weights_name(constant.weights, port.name):
                raise EngineBuildError(
                    f"weights can't be stripped: {trt.__name__} {trt.__version__} takes no placeholder for {port.name} "
                    f"({last_error(trt)}); expected tensorrt_rtx 1.7 or later: install it, or keep the weights out of "
                    "the engines with --weights external"
                )
            constants[port.name] = constant.get_output(0)
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        for slot in range(layer.num_inputs):
            tensor = layer.get_input(slot)
            if tensor is not None and tensor.name in constants:
                layer.set_input(slot, constants[tensor.name])
    for port in ports:
        if port.name in constants:
            network.remove_tensor(port)


def add_profile(builder: Any, config: Any, network: Any, profile: ProfileRecord) -> None:
    """Give the network's symbolic inputs their smallest, optimal and largest shapes.

    `batch` stands first everywhere, `time` second, and only there.
    """
    shapes = builder.create_optimization_profile()
    sizes = (1, 1), (profile.opt_batch, profile.opt_prompt), (profile.max_batch, profile.max_prompt)
    for place in range(network.num_inputs):
        port = network.get_input(place)
        shape = tuple(port.shape)
        if -1 in shape:
            smallest, optimal, largest = (
                tuple(size[axis] if length == -1 else length for axis, length in enumerate(shape)) for size in sizes
            )
            shapes.set_shape(port.name, smallest, optimal, largest)
    config.add_optimization_profile(shapes)
