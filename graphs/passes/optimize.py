"""What the exporter leaves behind is tidied up: folded, shared and unused nodes, constants as initializers.

onnxscript's own `optimize` also tries a hundred rewrite rules on every node, which takes a minute for a 30-layer model
and changes nothing that is not done here.
"""

import contextlib
import logging
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants


class Optimize(ir.passes.InPlacePass):
    """Fold constants and share what is computed twice; functions stay, and so do initializers without a value."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Optimize in place."""
        with quiet_loggers("onnx_ir", "onnxscript"):
            # Folding needs shapes to remove what they decide; what it removes makes room for one more round.
            for _ in range(2):
                fold_constants(model, input_size_limit=1024, output_size_limit=4096)
                IdentityEliminationPass()(model)
                RemoveUnusedNodesPass()(model)
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            DeduplicateInitializersPass()(model)
            CommonSubexpressionEliminationPass()(model)
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Keep libraries' remarks about initializers without values from the user's screen."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
