"""The opset a graph asks for. The exporter has no adapter to the newest ones, and imports it does not need."""

import onnx
import onnx_ir as ir


class SetOpset(ir.passes.InPlacePass):
    """Import exactly the domains in use, with ai.onnx at a given version.

    Args:
        version: Version of ai.onnx; every op in use must mean the same there as where the graph was made.
        domains: Versions of the other domains.
    """

    def __init__(self, version: int, domains: dict[str, int]) -> None:
        super().__init__()
        self.version = version
        self.domains = domains

    def requires(self, model: ir.Model) -> None:
        """Check that no op in use changed between the two opsets in a way that is seen here.

        A newer schema of an op may add dtypes and optional inputs or attributes; it must not drop what a node uses.
        """
        for node in model.graph:
            if node.domain:
                continue
            schema = onnx.defs.get_schema(node.op_type, self.version)
            unknown = set(node.attributes) - set(schema.attributes)
            if schema.deprecated or unknown or len(node.inputs) > schema.max_input:
                raise ir.passes.PreconditionError(f"{node.op_type} has no like in opset {self.version}: {unknown}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the imports."""
        used = {node.domain for node in model.graph} | {domain for domain, _, _ in model.functions}
        for function in model.functions.values():
            used |= {node.domain for node in function}
        model.opset_imports.clear()
        model.opset_imports[""] = self.version
        for domain in sorted(used - {""}):
            model.opset_imports[domain] = self.domains[domain]
        return ir.passes.PassResult(model, True)
