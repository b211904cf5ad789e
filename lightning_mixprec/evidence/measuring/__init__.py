"""What formats would do to a model: measured on batches, layer by layer, without a training."""
