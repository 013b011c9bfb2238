"""onnxscript's optimizer as a pass: constant folding, common subexpressions, no-op casts, unused nodes."""

import contextlib
import logging
from collections.abc import Iterator

import onnx_ir as ir
import onnxscript.optimizer


class Optimize(ir.passes.InPlacePass):
    """Run the optimizer; functions stay. Initializers without a value (weights) are left as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Optimize in place."""
        with quiet_loggers("onnx_ir", "onnxscript"):
            onnxscript.optimizer.optimize(model, inline=False)
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
