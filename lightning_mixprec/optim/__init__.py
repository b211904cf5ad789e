"""From gradients to weights: loss scaling, skipped steps, and optimizers for weights in 16 bits."""

from lightning_mixprec.optim.adamw import AdamW
from lightning_mixprec.optim.checkpoint_files import full_weights
from lightning_mixprec.optim.loaded_states import fp32_state_dict
from lightning_mixprec.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "fp32_state_dict", "full_weights"]
