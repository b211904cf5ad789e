"""From backward to weights: loss scaling, gradients, and buffers that skipped steps put back. Torch only."""
