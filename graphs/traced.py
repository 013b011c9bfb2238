"""A traced program as plain data: all that its translation needs, and small enough to send to another process."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

GETITEM = "getitem"
"""The operator that takes one result of several."""

_ASSERTION = "aten._assert_tensor_metadata.default"
"""What torch.export puts before casts, to find programs that do not fit their inputs."""

_MEANINGLESS = ("device", "layout", "pin_memory")
"""Arguments of ATen operators that say nothing about a graph."""


@dataclass(frozen=True)
class TracedTensor:
    """A tensor's shape, symbols by their names, and dtype. A symbolic size is a tensor without dimensions."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Reference:
    """An argument that is the value of that name."""

    name: str


@dataclass(frozen=True)
class TracedInput:
    """An input of a program, or a weight.

    Attributes:
        name: Of the value.
        weight: Name of the parameter or buffer; None for an input.
        tensor: Its shape and dtype.
        used: Whether anything uses it.
    """

    name: str
    weight: str | None
    tensor: TracedTensor
    used: bool


@dataclass(frozen=True)
class TracedCall:
    """An operator with its arguments, among them references.

    Attributes:
        name: Of the value that it returns.
        operator: E.g. "aten.add.Tensor".
        arguments: By position.
        options: By name, without those that say nothing about a graph.
        result: What it returns: a traced tensor, a tuple of them, or None for what no translated operator returns.
        module: The innermost module that it was called in; "" for the program itself.
    """

    name: str
    operator: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: Any
    module: str


@dataclass(frozen=True)
class TracedProgram:
    """A program: inputs and weights, calls in order, and the names of the values that it returns."""

    inputs: tuple[TracedInput, ...]
    calls: tuple[TracedCall, ...]
    outputs: tuple[str, ...]

    @property
    def weights(self) -> list[str]:
        """Names of the parameters and buffers."""
        return [value.weight for value in self.inputs if value.weight is not None]


def record(program: ExportedProgram) -> TracedProgram:
    """Return what torch.export made as plain data; no weight is kept."""
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    *nodes, results = program.graph.nodes
    inputs, calls = [], []
    for node in nodes:
        result = _result(node.meta.get("val"))
        if node.op == "placeholder":
            assert isinstance(result, TracedTensor)
            inputs.append(TracedInput(node.name, stored.get(node.name), result, bool(node.users)))
        elif str(node.target) != _ASSERTION:
            calls.append(_call(node, result))
    return TracedProgram(tuple(inputs), tuple(calls), tuple(output.name for output in results.args[0]))


def _call(node: fx.Node, result: Any) -> TracedCall:
    options = {key: value for key, value in node.kwargs.items() if key not in _MEANINGLESS}
    modules = list(node.meta.get("nn_module_stack", {}).values())
    return TracedCall(
        name=node.name,
        operator=GETITEM if node.target is operator.getitem else str(node.target),
        arguments=fx.map_arg(node.args, _refer),
        options=fx.map_arg(options, _refer),
        result=result,
        module=modules[-1][0] if modules else "",
    )


def _refer(node: fx.Node) -> Any:
    return Reference(node.name)


def _result(value: object) -> Any:
    if isinstance(value, Tensor):
        return TracedTensor(tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape), value.dtype)
    if isinstance(value, torch.SymInt):
        return TracedTensor((), torch.int64)
    return tuple(map(_result, value)) if isinstance(value, list | tuple) else None
