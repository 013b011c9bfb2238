"""Building a graph node by node: onnx-ir's tape, with the constants, casts and reshapes that translations need."""

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from tnllm_export.errors import ExportError
from tnllm_export.graphs.passes.name_nodes import MODULE

Attribute = int | float | str


class Builder:
    """Appends nodes to a graph whose inputs are there already: `builder("Add", x, y)`.

    Constants become initializers, each made once.

    Attributes:
        module: The module that new nodes belong to; None where that is to be told from their users.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.module: str | None = None
        self._graph = graph
        self._tape = ir.tape.Tape(graph)
        self._targets: dict[tuple[int | str, ...], ir.Value] = {}

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        """Append a node with one output."""
        return self.many(1, op_type, inputs, attributes)[0]

    def many(
        self,
        count: int,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Attribute] | None = None,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        metadata = {} if self.module is None else {MODULE: self.module}
        return self._tape.op_multi_out(
            op_type, inputs, attributes, domain=domain, num_outputs=count, metadata_props=metadata
        )

    def ints(self, *values: int) -> ir.Value:
        """Return a constant [n] int64."""
        name = "_".join(("ints", *map(str, values))).replace("-", "m")
        return self._constant(name, ir.tensor(values, dtype=ir.DataType.INT64))

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """Return a constant without dimensions."""
        return self._constant(f"{dtype.name.lower()}_{value}", ir.tensor(value, dtype=dtype))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return x in a dtype: x itself where it has it."""
        return x if x.dtype == dtype else self("Cast", x, to=int(dtype))

    def reshape(self, x: ir.Value, shape: Iterable[int | str]) -> ir.Value:
        """Reshape x, by a constant target wherever at most one dimension must be inferred.

        In a target, 0 copies the dimension of x at the same place and -1 infers one. Only where several symbolic
        dimensions come from elsewhere the target is computed, once for all reshapes that share it.
        """
        old, new = _dims(x.shape or ()), _dims(shape)
        target = [
            dim if isinstance(dim, int) else 0 if old[axis : axis + 1] == (dim,) else -1 for axis, dim in enumerate(new)
        ]
        return self("Reshape", x, self.ints(*target) if target.count(-1) <= 1 else self._computed_target(new[:-1]))

    def _computed_target(self, leading: tuple[int | str, ...]) -> ir.Value:
        """Return [*leading, -1], with the leading dimensions of a graph input that starts with them."""
        if leading not in self._targets:
            end, module = len(leading), self.module
            source = next((value for value in self._graph.inputs if _dims(value.shape or ())[:end] == leading), None)
            if source is None:
                raise ExportError(f"a reshape needs the dimensions {leading}, but no input of the program has them")
            self.module = None
            self._targets[leading] = self("Concat", self("Shape", source, start=0, end=end), self.ints(-1), axis=0)
            self.module = module
        return self._targets[leading]

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        known = self._graph.initializers.get(name)
        return self._tape.initializer(tensor, name) if known is None else known


def _dims(shape: Iterable[int | str | ir.SymbolicDim]) -> tuple[int | str, ...]:
    return tuple(str(dim.value) if isinstance(dim, ir.SymbolicDim) else dim for dim in shape)
