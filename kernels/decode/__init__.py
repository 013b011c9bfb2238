"""One token through a layer in few kernels: each reads its weights once and does what stands before and after them."""
