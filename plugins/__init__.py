"""How TensorRT runs our ops: a C++ plugin library around kernels that were compiled ahead of time."""
