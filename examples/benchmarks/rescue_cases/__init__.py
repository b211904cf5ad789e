"""Small models that fail in fp16 for a documented reason, and healthy ones that do not."""

from . import attention, controls, further, gradients, losses, norms, positions
from .base import Batches, Case

CASES: dict[str, type[Case]] = {
    "ffn": attention.OutputProjection,
    "attention-logits": attention.AttentionLogits,
    "rms-norm": norms.SilentNorm,
    "ranking": losses.Ranking,
    "prices": losses.Prices,
    "likelihood": losses.Likelihood,
    "dice": losses.SoftDice,
    "tasks": gradients.TwoTasks,
    "fourier": positions.Phases,
    "rotary": positions.Positions,
    "offset": norms.Offset,
    "outlier": norms.Outlier,
    "gan": gradients.Adversarial,
    "alignment": losses.Alignment,
    "mask": attention.AdditiveMask,
    "recurrence": gradients.Recurrence,
    "experts": positions.Experts,
    "words": gradients.Words,
    "variance": further.Cancellation,
    "short-vectors": further.ShortVectors,
    "distances": positions.Prototypes,
    "covariance": further.Decorrelated,
    "clock": further.TimeOfDay,
    "sets": further.Sets,
}
CONTROLS: dict[str, type[Case]] = {
    "mlp": controls.Healthy,
    "resnet": controls.ResNet,
    "gpt": controls.GPT,
    "contrastive": controls.Contrastive,
    "tiny-weight": controls.TinyWeight,
}

__all__ = ["CASES", "CONTROLS", "Batches", "Case"]
