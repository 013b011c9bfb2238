"""Reshape targets as constants: 0 copies a dimension, -1 infers one, and no shape is computed at run time."""

import onnx_ir as ir


class StaticReshapes(ir.passes.InPlacePass):
    """Replace a Reshape's computed target by a constant wherever at most one dimension must be inferred."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Reshape whose shapes are known up to symbolic dimensions."""
        modified = False
        for node in model.graph:
            if node.op_type != "Reshape" or node.domain:
                continue
            data, shape = node.inputs
            if data is None or shape is None or ir.convenience.get_const_tensor(shape) is not None:
                continue
            target = _target(data, node.outputs[0])
            if target is None:
                continue
            constant = ir.Value(name=f"{node.name}_shape", const_value=ir.tensor(target, dtype=ir.DataType.INT64))
            constant.shape, constant.dtype = ir.Shape([len(target)]), ir.DataType.INT64
            model.graph.register_initializer(constant)
            node.replace_input_with(1, constant)
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
            modified = True
        return ir.passes.PassResult(model, modified)


def _target(data: ir.Value, result: ir.Value) -> list[int] | None:
    """Return the constant target, or None where the shapes don't determine one."""
    if data.shape is None or result.shape is None:
        return None
    target: list[int] = []
    for axis, dim in enumerate(result.shape):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(data.shape) and dim == data.shape[axis] and dim.value is not None:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
