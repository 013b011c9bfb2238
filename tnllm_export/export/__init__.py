"""From a checkpoint to a bundle: the only place that knows both sides of it."""
