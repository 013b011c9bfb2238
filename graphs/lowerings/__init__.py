"""One module per lowering of the two ops."""
