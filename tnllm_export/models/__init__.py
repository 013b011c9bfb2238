"""From a checkpoint folder to the eager model."""
