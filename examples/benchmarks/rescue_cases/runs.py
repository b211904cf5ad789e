"""One run of a case of the rescue suite, and what is to be known of it afterwards."""

import contextlib
import gc
import io
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_mixprec import PerLayerPrecision

from . import CASES, CONTROLS
from .base import Batches, Case

LOW = ("fp16", "bf16", "fp8")
EVALUATED = 8
STOCK = ("fp32", "16-mixed", "bf16-mixed")
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FORMULAS = {**flop_registry, _CPU_ATTENTION: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        how: fp32, 16-mixed, bf16-mixed, ours, or fp16 (ours without the controller).
        loss: the final loss; NaN if it could not be computed.
        is_finite: whether weights, buffers, eval-mode predictions and eval-mode losses all are.
        error: what one of our runs died of, if it did; those of Lightning are not supposed to raise.
        skipped: optimizer steps.
        steps: optimizer steps asked for.
        seconds: from the first to the last training step.
        flops: of the matmuls in a forward pass, by layer (fp32 runs only).
        formats: what each layer computed in at the end (ours only).
        history: the plugin's (ours only).
    """

    case: str
    seed: int
    how: str
    loss: float
    is_finite: bool
    error: str
    skipped: int
    steps: int
    seconds: float
    flops: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


class Flops(TorchDispatchMode):
    """Counts the matmul FLOPs of forward passes, each at the innermost layer that runs."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.running = [""]
        self.hooks: list[Any] = []
        for name, child in module.named_modules():
            if name:
                self.hooks.append(child.register_forward_pre_hook(self._entered(name)))
                self.hooks.append(child.register_forward_hook(self._left, always_call=True))

    def _entered(self, name: str) -> Callable[..., None]:
        return lambda *rest: self.running.append(name)

    def _left(self, *rest: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_backward = torch._C._current_graph_task_id() != -1
        if not is_backward and (formula := _FORMULAS.get(func._overloadpacket)) is not None:
            self.counts[self.running[-1]] += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def stop(self) -> None:
        """Remove what looks on."""
        for hook in self.hooks:
            hook.remove()


class CountFlops(Callback):
    """Counts those of the first step."""

    def __init__(self, is_wanted: bool) -> None:
        self.is_wanted = is_wanted
        self.counter: Flops | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        if self.is_wanted and batch_idx == 0:
            self.counter = Flops(module)
            self.counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self.counter is not None and batch_idx == 0:
            self.counter.__exit__(None, None, None)
            self.counter.stop()


class TrainingTime(Callback):
    """Takes the time from the first to the last step; has to be the first callback."""

    start = seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == 0:
            self.start = self._now(module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.seconds = self._now(module) - self.start

    def _now(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class CountSkips(Callback):
    """Counts the skipped steps of Lightning's own fp16 by the halvings of its scale, which never grows in these runs.

    Once the scale is zero nothing is left to halve: every later step divides by zero, and counts as skipped.
    """

    skipped = 0
    scale = None

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self.scale = self._scale(trainer)

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        before, after = self.scale, self._scale(trainer)
        if before is not None:
            self.skipped += round(math.log2(before / after)) if after > 0 else 1

    @staticmethod
    def _scale(trainer: Trainer) -> float | None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler.get_scale() if isinstance(scaler, torch.amp.GradScaler) else None


def plugin_for(how: str, device: str) -> tuple[Precision, list[Callback]]:
    """Return the plugin and the callbacks of a kind of run."""
    if how == "fp32":
        return Precision(), []
    if how in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(how, device), []
    if how == "fp16":
        return PerLayerPrecision("fp16"), []
    from lightning_mixprec import AdaptivePrecision

    return PerLayerPrecision("fp16"), [AdaptivePrecision()]


def run_case(case: str, seed: int, how: str, device: str = "cpu", steps: int | None = None) -> Outcome:
    """Train and evaluate a case once; whatever the kind of run, from the same weights on the same batches.

    Args:
        case: its name in CASES or CONTROLS.
        seed: of the weights and of the data.
        how: fp32, 16-mixed, bf16-mixed, ours, or fp16 (ours without the controller).
        device: cpu or cuda.
        steps: instead of the case's own number.
    """
    kind = {**CASES, **CONTROLS}[case]
    steps = steps or kind.steps
    torch.manual_seed(seed)
    module, (plugin, callbacks) = kind(), plugin_for(how, device)
    flops, skips, clock = CountFlops(how == "fp32"), CountSkips(), TrainingTime()
    training = kind.training(torch.Generator().manual_seed(seed), steps)
    held_out = kind.batches(torch.Generator().manual_seed(seed + 1000), EVALUATED)
    gc.collect()
    error = ""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = _trainer(device, plugin, [clock, *callbacks, flops, skips], folder)
        try:
            trainer.fit(module, Batches(training))
            trainer.validate(module, Batches(held_out), verbose=False)
        except Exception as problem:
            if how in STOCK:
                raise
            error = f"{type(problem).__name__}: {problem}"
    loss, is_finite = (float("nan"), False) if error else _judged(module, held_out)
    is_ours = isinstance(plugin, PerLayerPrecision)
    return Outcome(
        case=case,
        seed=seed,
        how=how,
        loss=loss,
        is_finite=is_finite,
        error=error,
        skipped=plugin.skipped_steps if is_ours else skips.skipped,
        steps=steps * kind.optimizer_count,
        seconds=clock.seconds,
        flops=dict(flops.counter.counts) if flops.counter else {},
        formats={name: layer.compute for name, layer in (plugin.assignment or {}).items()} if is_ours else {},
        history=list(plugin.history) if is_ours else [],
    )


def _trainer(device: str, plugin: Precision, callbacks: list[Callback], folder: str) -> Trainer:
    return Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        plugins=[plugin],
        callbacks=callbacks,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _judged(module: Case, held_out: list[Any]) -> tuple[float, bool]:
    """Return the final loss, and whether everything is finite."""
    module.cpu().eval()
    evaluated = [(prediction.cpu(), loss.cpu()) for prediction, loss in module.evaluated]
    with torch.no_grad():
        losses = [module.quality(given[0], batch[1]) for given, batch in zip(evaluated, held_out, strict=True)]
    seen = [*module.parameters(), *module.buffers(), *(each for given in evaluated for each in given)]
    is_finite = all(bool(each.isfinite().all()) for each in seen if each.is_floating_point())
    return torch.stack(losses).mean().item(), is_finite
