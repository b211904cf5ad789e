"""``PerLayerPrecision``: the Lightning precision plugin that gives every layer the format its policy says."""

import contextlib
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec import plugin_checks as checks
from lightning_mixprec.engine.apply import Attachment, attach
from lightning_mixprec.engine.buffers import BufferGuard
from lightning_mixprec.engine.casting import cast_floating
from lightning_mixprec.errors import MixPrecError, PolicyError
from lightning_mixprec.numerics.scaling import LossScaler, LossScaling, needs_closure
from lightning_mixprec.plugin_state import PluginState, history_entries
from lightning_mixprec.plugin_steps import SchedulerGate, StepLedger
from lightning_mixprec.policy.assignment import Assignment
from lightning_mixprec.policy.rules import PrecisionPolicy, as_policy
from lightning_mixprec.policy.table import show

_LIGHTNING_NAMES = {"fp64": "64-true", "fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_BEFORE_BACKWARD = ("on_before_zero_grad", "optimizer_zero_grad")


class PerLayerPrecision(Precision):
    """Trains every layer in the number format that a policy gives it, and scales the loss where fp16 needs it.

    Args:
        policy: ``"auto"`` (bf16 where the device computes it natively, else fp16), a format name (``"fp16"`` trains as
            Lightning's ``16-mixed``, ``"bf16"`` as ``bf16-mixed``, ``"fp32"`` as ``32-true``), a path to a YAML file,
            a mapping such as ``{"default": "bf16", "model.head": "fp32"}``, or a ``PrecisionPolicy``.
        loss_scaling: ``"auto"`` (on exactly when some layer computes in fp16), False, a number (a static scale), a
            mapping of options, or a ``LossScaling``.
        skip_nonfinite: Skip optimizer steps with non-finite gradients in every format, not only under loss scaling.
        eval_policy: A policy that holds during validate, test and predict instead.
        on_policy_change: What to do when a checkpoint is resumed that was written under another configured policy:
            ``"raise"``, ``"accept"`` the policy configured now, or take the one of the ``"checkpoint"``.

    Attributes:
        scaler: The loss scaler; ``get_scale()`` is 1 while nothing is scaled.
        history: One plain dict per precision change: step, layer, from, to, reason. The first assignment is none.

    Raises:
        MixPrecError: An argument is malformed; one line that says what is allowed.

    >>> PerLayerPrecision({"default": "bf16", "model.head": "fp32"}).policy.default
    'bf16'
    """

    def __init__(
        self,
        policy: str | PrecisionPolicy | dict[str, Any] = "auto",
        loss_scaling: bool | float | LossScaling | dict[str, Any] | str = "auto",
        skip_nonfinite: bool = True,
        eval_policy: str | PrecisionPolicy | dict[str, Any] | None = None,
        on_policy_change: Literal["raise", "accept", "checkpoint"] = "raise",
    ) -> None:
        checks.check_choice("on_policy_change", on_policy_change, ("raise", "accept", "checkpoint"))
        checks.check_choice("skip_nonfinite", skip_nonfinite, (True, False))
        self._configured = checks.configured_form(policy)
        self._policy = None if self._configured == "auto" else as_policy(policy)
        self._eval_policy = None if eval_policy is None else as_policy(eval_policy)
        self._loss_scaling = checks.as_loss_scaling(loss_scaling)
        self._on_policy_change = on_policy_change
        self.history: list[dict[str, Any]] = []
        self.scaler = LossScaler(guards=skip_nonfinite)
        self._ledger = StepLedger(self.scaler)
        self._assignment: Assignment | None = None
        self._eval_assignment: Assignment | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._model: weakref.ref[pl.LightningModule] | None = None
        self._attachment: Attachment | None = None
        self._buffers: BufferGuard | None = None
        self._optimizers: list[Optimizer] = []
        self._in_force: Assignment | None = None
        self._to_watch = {"train", "eval"}
        self._in_step = self._in_eval = False
        self._resumed_step = 0

    # What others read

    @property
    def precision(self) -> str:  # type: ignore[override]
        """Lightning's name for the default format, for its model summary and others that ask the Trainer."""
        return _LIGHTNING_NAMES[self._policy.default] if self._policy is not None else "32-true"

    @property
    def policy(self) -> PrecisionPolicy | None:
        """The policy in force, changes made during the run included; None for ``"auto"`` before the device is known."""
        return self._eval_policy if self._in_eval and self._eval_policy is not None else self._policy

    @property
    def assignment(self) -> Assignment | None:
        """The policy in force resolved against the model: module name to param, compute, output and rule."""
        return self._eval_assignment if self._in_eval and self._eval_assignment is not None else self._assignment

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far because of non-finite gradients. May wait for the device."""
        return self._ledger.skipped_steps

    def step_was_skipped(self, optimizer: Optimizer | LightningOptimizer) -> bool:
        """Whether the optimizer's latest step was skipped. May wait for the device.

        In manual optimization, ask this before calling ``scheduler.step()``.
        """
        return self._ledger.was_skipped(checks.raw(optimizer))

    # Changing a running model

    def set_policy(self, policy: str | dict[str, Any] | PrecisionPolicy, reason: str = "set_policy") -> None:
        """Replaces the policy of the running model, between steps; changes compute and output formats, never param.

        Args:
            policy: A format name, a path, a mapping or a ``PrecisionPolicy``.
            reason: Goes into the history.

        Raises:
            PolicyError: No model is running, a step is, or the policy does not fit the model.
        """
        self._adopt(as_policy(policy), reason)

    def edit_policy(self, edits: Mapping[str, Any], reason: str = "edit_policy") -> None:
        """Amends the policy of the running model, between steps.

        Args:
            edits: Pattern to compute format, or to ``"c=bf16,o=input"``. They decide before the rules in force.
            reason: Goes into the history.

        Raises:
            PolicyError: As in :meth:`set_policy`.
        """
        model = self._running_model()
        assert self._policy is not None
        self._adopt(self._policy.amend(edits, model), reason)

    def _adopt(self, policy: PrecisionPolicy, reason: str) -> None:
        model = self._running_model()
        assignment = policy.resolve(model)
        assert self._assignment is not None and self._attachment is not None
        checks.check_storage_unchanged(self._assignment, assignment)
        checks.check_optimizers(self._optimizers, checks.scaling_for(self._loss_scaling, assignment))
        checks.warn_of_emulation(assignment, model.trainer.strategy.root_device)
        self.history += history_entries(self._assignment, assignment, model.trainer.global_step, reason)
        self._policy, self._assignment = policy, assignment
        self.scaler.configure(checks.scaling_for(self._loss_scaling, assignment), self._optimizers)
        self._bring_in_force(assignment)

    def _running_model(self) -> pl.LightningModule:
        model = self._model() if self._model is not None else None
        if model is None or self._attachment is None:
            raise PolicyError(
                "The policy of a running model was to change, but none is running; pass the policy to "
                "PerLayerPrecision(policy=...), or change it from a callback during fit."
            )
        if self._in_step or model._current_fx_name in _BEFORE_BACKWARD:
            raise PolicyError(
                "The policy was to change in the middle of a step, where backward would recompute in other formats; "
                "change it between steps, for example in on_train_batch_start or on_train_batch_end."
            )
        return model

    def _bring_in_force(self, assignment: Assignment) -> None:
        if self._attachment is not None and self._in_force is not assignment:
            self._attachment.change(assignment)
            self._in_force = assignment

    # Set-up and teardown

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        self.teardown()
        model = checks.check_lightning_module(module)
        strategy = model.trainer.strategy
        checks.check_strategy(strategy)
        chosen = ""
        if self._policy is None:
            default, chosen = checks.choose_format(strategy.root_device)
            self._policy = PrecisionPolicy(default)
        self._assignment = self._policy.resolve(model)
        self._eval_assignment = None if self._eval_policy is None else self._eval_policy.resolve(model)
        for assignment in filter(None, (self._assignment, self._eval_assignment)):
            checks.warn_of_emulation(assignment, strategy.root_device)
        if self._eval_assignment is not None:
            checks.check_storage_unchanged(self._assignment, self._eval_assignment)
        checks.warn_of_narrow_weights(model, self._assignment)
        self.scaler.configure(checks.scaling_for(self._loss_scaling, self._assignment))
        self._attachment = attach(model, self._assignment, strategy.root_device.type)
        self._in_force, self._model = self._assignment, weakref.ref(model)
        if model.trainer.state.fn == TrainerFn.FITTING and strategy.is_global_zero and not model.trainer.barebones:
            show(self._assignment, title=f"policy 'auto': {chosen}" if chosen else None)
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        pl_module = self._model() if self._model is not None else None
        if optimizers and pl_module is not None:
            checks.check_optimizers(optimizers, self.scaler.options)
            self._optimizers = [checks.raw(optimizer) for optimizer in optimizers]
            self._ledger.connect(pl_module, self._optimizers, lr_schedulers)
            if self.scaler.is_active or self.scaler.guards:
                self._buffers = BufferGuard(pl_module, self._optimizers)
            if pl_module.automatic_optimization and any(config.interval == "step" for config in lr_schedulers):
                SchedulerGate(pl_module, self._ledger)
        return model, optimizers, lr_schedulers

    @override
    def teardown(self) -> None:
        model = self._model() if self._model is not None else None
        if model is not None and isinstance(gate := vars(model).get("lr_scheduler_step"), SchedulerGate):
            gate.remove()
        try:
            if self._attachment is not None:
                self._attachment.detach()
        finally:
            self._forget_run()
            self._ledger.disconnect()

    # The steps

    @override
    @contextlib.contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        with self._attachment.context() if self._attachment is not None else contextlib.nullcontext():
            yield

    @override
    def convert_input(self, data: Any) -> Any:
        """Casts a batch for a LightningModule whose own operations compute in fp64; others take it as it comes."""
        model = self._model() if self._model is not None else None
        trains = model is None or model.trainer.training
        assignment = self._assignment if trains else self._eval_assignment or self._assignment
        if assignment is not None and assignment[""].compute == "fp64":
            return cast_floating(data, torch.float64)
        return data

    @override
    @contextlib.contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        if self._assignment is not None:
            self._bring_in_force(self._assignment)
        if self._buffers is not None:
            self._buffers.open()
        with self._watched("train"), self.forward_context():
            yield
        if not self._is_automatic():
            self.scaler.update(self._optimizers)

    @override
    @contextlib.contextmanager
    def val_step_context(self) -> Generator[None, None, None]:
        assignment = self._eval_assignment or self._assignment
        if assignment is not None:
            self._bring_in_force(assignment)
        self._in_eval = True
        try:
            with self._watched("eval"), self.forward_context():
                yield
        finally:
            self._in_eval = False

    test_step_context = val_step_context
    predict_step_context = val_step_context

    @contextlib.contextmanager
    def _watched(self, kind: str) -> Generator[None, None, None]:
        watching = self._attachment if kind in self._to_watch else None
        if watching is not None:
            self._to_watch.discard(kind)
            watching.begin_watch()
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            if watching is not None:
                watching.end_watch()

    def _is_automatic(self) -> bool:
        model = self._model() if self._model is not None else None
        return model is None or model.automatic_optimization

    @override
    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Shows the hooks the loss as the user knows it, and hands on the scaled one."""
        self._in_step = True
        return self.scaler.scale(super().pre_backward(tensor, module))

    @override
    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Runs backward outside autocast, so that in manual optimization, too, fp32 layers have fp32 gradients."""
        device_type = model.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                super().backward(tensor, model, optimizer, *args, **kwargs)
        else:
            super().backward(tensor, model, optimizer, *args, **kwargs)

    @override
    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        self._in_step = not self._is_automatic()
        return super().post_backward(tensor, module)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if needs_closure(optimizer):
            result = super().optimizer_step(optimizer, model, closure, **kwargs)
            torch.clear_autocast_cache()
            self._ledger.note(optimizer, skipped=False, at_minimum=False)
            return result
        with torch.enable_grad():
            closure_result = closure()
        # Only now, when the device has this batch's work: waiting for the last batch's outcome leaves it no gap.
        self._ledger.settle_earlier_batches()
        self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        skipped = self.scaler.step(optimizer, **kwargs)
        torch.clear_autocast_cache()
        at_minimum = self.scaler.is_at_minimum() if skipped is not False else False
        if self._buffers is not None:
            self._buffers.close(optimizer, skipped)
            if not model.automatic_optimization:
                self._buffers.open()
        if model.automatic_optimization:
            self.scaler.update()
        self._ledger.note(optimizer, skipped, at_minimum)
        return closure_result

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val > 0:
            self.scaler.unscale_(checks.raw(optimizer))
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    # Checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return PluginState(
            configured=self._configured,
            policy=self._policy.to_dict() if self._policy is not None else {},
            history=self.history,
            steps=self._ledger.state_dict(),
            scaler=self.scaler.state_dict(),
        ).to_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the loss scale of a checkpoint of Lightning's own plugins, and weights in full precision."""
        self._resumed_step = checkpoint.get("global_step", 0)
        if type(self).__qualname__ not in checkpoint:
            self.scaler.load_state_dict(checks.stock_scaler_state(checkpoint))
        if self._attachment is not None:
            weights = checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))
            self._attachment.restore_precise(weights)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model = self._model() if self._model is not None else None
        if model is None or self._assignment is None:
            raise MixPrecError("The state of PerLayerPrecision can only be loaded while its Trainer is set up.")
        state = PluginState.from_dict(state_dict, whole=self.state_dict())
        is_resume = model.trainer.state.fn == TrainerFn.FITTING
        policy = state.policy_to_resume(self._configured, self._on_policy_change if is_resume else "accept")
        if policy is not None:
            self._adopt(policy, "checkpoint")
            self._configured = state.configured
        if not is_resume:
            return
        self.history = list(state.history)
        if policy is None and self._configured != state.configured:
            written_under = replace(PrecisionPolicy.from_dict(state.policy), allow_unmatched=True).resolve(model)
            self.history += history_entries(
                written_under, self._assignment, self._resumed_step, "resumed with another configured policy"
            )
        self.scaler.load_state_dict(state.scaler)
        self._ledger.load_state_dict(state.steps)
