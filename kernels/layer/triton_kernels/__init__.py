"""Triton code of the layer's ops. Its modules import triton, so they are imported only where kernels run."""
