"""``PerLayerPrecision``: the Lightning precision plugin that gives every layer the format its policy says."""

import contextlib
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.optim.loss_scaling import LossScaler
from lightning_mixprec.optim.loss_scaling_options import LossScaling
from lightning_mixprec.optim.skipped_buffers import BufferGuard
from lightning_mixprec.plugin import arguments
from lightning_mixprec.plugin.formats_in_force import FormatsInForce, attributes_of_copy
from lightning_mixprec.plugin.lightnings import Precision, check_lightning_module, raw
from lightning_mixprec.plugin.notices import tell_of_emulation, tell_of_formats, warn_of_costs
from lightning_mixprec.plugin.state import PluginState, history_entries, saved_state, stock_scaler_state
from lightning_mixprec.plugin.step_errors import StepErrors, taken_again
from lightning_mixprec.plugin.steps import StepLedger
from lightning_mixprec.plugin.strategies import check_strategy, row_of
from lightning_mixprec.policy.assignment import Assignment
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy
from lightning_mixprec.records.changes import Move


class PerLayerPrecision(Precision):
    """Trains every layer in the number format that a policy gives it, and scales the loss where fp16 needs it.

    Args:
        policy: ``"auto"`` (bf16 where the device computes it natively, else fp16 where it does, else fp32), a format
            name (``"fp16"`` trains as Lightning's ``16-mixed``, ``"bf16"`` as ``bf16-mixed``, ``"fp32"`` as
            ``32-true``), a path to a YAML file, a mapping such as ``{"default": "bf16", "model.head": "fp32"}``, or a
            ``PrecisionPolicy``.
        loss_scaling: ``"auto"`` (on exactly when some layer computes in fp16), False, a number (a static scale), a
            mapping of options, or a ``LossScaling``.
        skip_nonfinite: Skip optimizer steps with non-finite gradients in every format, not only under loss scaling.
        eval_policy: A policy that holds during validate, test and predict instead.
        on_policy_change: What to do when a checkpoint is resumed that was written under another configured policy:
            ``"raise"``, ``"accept"`` the policy configured now, or take the one of the ``"checkpoint"``.
        emulate: Whether 16 bits are computed as on a tensor core, by products in fp32 of operands rounded to 16 bits:
            ``"auto"`` (where the device has no such arithmetic), True, or False (torch's own kernels, which are slow).

    Attributes:
        scaler: The loss scaler; ``get_scale()`` is 1 while nothing is scaled.
        not_in_fp32: By layer that fails in fp32 the error; callbacks that find one add it, for this run.
        eval_policy: The policy of validate, test and predict, if they have one of their own.
        history: One plain dict per change (the first assignment is none): step, layer, from, to, reason, any evidence.

    Raises:
        MixPrecError: An argument is malformed; one line that says what is allowed.

    >>> PerLayerPrecision({"default": "bf16", "model.head": "fp32"}).policy.default
    'bf16'
    """

    _IN_ROWS = "PerLayerPrecision"  # how the rows of strategies name this plugin

    def __init__(
        self,
        policy: str | PrecisionPolicy | dict[str, Any] = "auto",
        loss_scaling: bool | float | LossScaling | dict[str, Any] | str = "auto",
        skip_nonfinite: bool = True,
        eval_policy: str | PrecisionPolicy | dict[str, Any] | None = None,
        on_policy_change: Literal["raise", "accept", "checkpoint"] = "raise",
        emulate: bool | Literal["auto"] = "auto",
    ) -> None:
        arguments.check_choice("on_policy_change", on_policy_change, ("raise", "accept", "checkpoint"))
        arguments.check_choice("skip_nonfinite", skip_nonfinite, (True, False))
        self._configured = arguments.configured_form(policy)
        self.eval_policy = None if eval_policy is None else as_policy(eval_policy)
        training = None if self._configured == "auto" else as_policy(policy)
        self._formats = FormatsInForce(training, self.eval_policy, emulate)
        self._loss_scaling = arguments.as_loss_scaling(loss_scaling)
        self._on_policy_change = on_policy_change
        self.history: list[Move] = []
        self.scaler = LossScaler(guards=skip_nonfinite)
        self._ledger = StepLedger(self.scaler)
        self._forget_run()

    def _forget_run(self) -> None:
        self.not_in_fp32: dict[str, str] = {}
        self.step_errors = StepErrors()
        self._model: weakref.ref[pl.LightningModule] | None = None
        self._buffers: BufferGuard | None = None
        self._optimizers: list[Optimizer] = []
        self._resumed_step = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes along what was configured and learned, and nothing of the run."""
        return attributes_of_copy(self)

    # What others read

    @property
    def precision(self) -> str:  # type: ignore[override]
        """Lightning's name for the default format, for its model summary and others that ask the Trainer."""
        return self._formats.lightning_name

    @property
    def policy(self) -> PrecisionPolicy | None:
        """The policy in force, changes made during the run included; None for ``"auto"`` before the device is known."""
        return self._formats.policy

    @property
    def configured_policy(self) -> PrecisionPolicy | None:
        """The policy that training was configured with; None for ``"auto"`` before the device is known."""
        return self._formats.configured

    @property
    def assignment(self) -> Assignment | None:
        """The policy in force resolved against the model: module name to param, compute, output and rule."""
        return self._formats.assignment

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far because of non-finite gradients. May wait for the device."""
        return self._ledger.skipped_steps

    def step_was_skipped(self, optimizer: Optimizer | LightningOptimizer) -> bool:
        """True if the optimizer's latest step was skipped. May wait for the device.

        In manual optimization, ask this before calling ``scheduler.step()``; under DDP on every rank, because
        ``global_step`` is put right when the outcome is asked for.
        """
        return self._ledger.was_skipped(raw(optimizer))

    # Changing a running model

    def set_policy(
        self,
        policy: str | dict[str, Any] | PrecisionPolicy,
        reason: str = "set_policy",
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        """Replaces the policy of the running model, between steps; changes compute and output formats, never param.

        Args:
            policy: A format name, a path, a mapping or a ``PrecisionPolicy``.
            reason: Goes into the history.
            evidence: Goes into each of the change's entries in the history; of plain types.

        Raises:
            PolicyError: No model is running, a step is, or the policy does not fit the model.
        """
        self._adopt(as_policy(policy), reason, evidence)

    def check_policy(self, policy: str | dict[str, Any] | PrecisionPolicy) -> None:
        """Raises where :meth:`set_policy` would raise for a policy, and changes nothing."""
        self._fitted(as_policy(policy))

    def edit_policy(
        self, edits: Mapping[str, Any], reason: str = "edit_policy", evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Amends the policy of the running model, between steps; raises as :meth:`set_policy`.

        Args:
            edits: Pattern to compute format, to ``"c=bf16,o=input"``, or to a mapping with compute, output and recurse
                (false for own operations alone). They decide before the rules in force.
            reason: Goes into the history.
            evidence: As in :meth:`set_policy`.
        """
        self._adopt(self._formats.amended(edits, self._running_model()), reason, evidence)

    def set_loss_scale(self, scale: float) -> None:
        """Moves the dynamic loss scale of the running model, between steps and within its bounds.

        Raises:
            ScalingError: Nothing is scaled, the scale is static, or this is no scale.
        """
        self._running_model("The loss scale")
        self.scaler.move_to(scale, self._optimizers)

    def full_weights(self) -> contextlib.AbstractContextManager[None]:
        """Weights that rules store in 16 bits are in fp32 within, all bits there; writes are kept. Between steps."""
        return self._formats.full_weights(self._running_model("The storage"))

    def _adopt(self, policy: PrecisionPolicy, reason: str, evidence: Mapping[str, Any] | None = None) -> None:
        assignment, options = self._fitted(policy)
        model, before = self._running_model(), self._formats.resolved_for_training
        tell_of_emulation(assignment.compute_formats - before.compute_formats, model, self._formats.backends)
        self._ledger.settle()
        entries = history_entries(before, assignment, model.trainer.global_step, reason, evidence)
        self._formats.replace(policy, assignment)
        self.scaler.configure(options, self._optimizers)
        self.history += entries

    def _fitted(self, policy: PrecisionPolicy) -> tuple[Assignment, LossScaling | None]:
        """A policy resolved against the running model, and how the loss is scaled then; raises if it does not fit."""
        assignment, before = policy.resolve(self._running_model()), self._formats.resolved_for_training
        return assignment, arguments.check_change(before, assignment, self._loss_scaling, self._optimizers)

    def _running_model(self, what: str = "The policy") -> pl.LightningModule:
        return self._formats.between_steps(self._current_model(), what)

    def _current_model(self) -> pl.LightningModule | None:
        return self._model() if self._model is not None else None

    def guard_buffers_anew(self) -> None:
        """Has skipped steps put buffers back to what they are now; for callbacks that wrote earlier values back."""
        if self._buffers is not None:
            self._buffers = BufferGuard(self._running_model(), self._optimizers)

    # Set-up and teardown

    def fully_shard(self, pl_module: pl.LightningModule, modules: Sequence[nn.Module], **options: Any) -> None:
        """Shards modules with FSDP2, each gathered in the format its layers compute in; for ``configure_model``.

        Args:
            pl_module: The LightningModule, with all its layers.
            modules: Modules of it, in any order; the outermost one that is called has to be among them.
            options: What ``torch.distributed.fsdp.fully_shard`` takes beside ``mp_policy``.

        Raises:
            MixPrecError: The strategy is no ModelParallelStrategy, or the policy does not fit the model.
        """
        self._formats.shard(check_lightning_module(pl_module), modules, options)

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        self.teardown()
        strategy = (model := check_lightning_module(module)).trainer.strategy
        check_strategy(strategy, self._IN_ROWS)
        self.scaler.shared_on = strategy.root_device if row_of(strategy).is_sharding else None
        training, evaluation = self._formats.resolve(model)
        warn_of_costs(model, training, evaluation, self._formats.backends)
        self.scaler.configure(arguments.scaling_for(self._loss_scaling, training))
        self._formats.attach(model, strategy.root_device.type)
        self._model = weakref.ref(model)
        tell_of_formats(model, training, self._formats.defaults, self._formats.chosen)
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        if optimizers and (pl_module := self._current_model()) is not None:
            arguments.check_optimizers(optimizers, self.scaler.options)
            self._optimizers = self._formats.hand_over(pl_module, [raw(optimizer) for optimizer in optimizers])
            self._ledger.connect(pl_module, self._optimizers, lr_schedulers)
            if self.scaler.is_active or self.scaler.guards:
                self._buffers = BufferGuard(pl_module, self._optimizers)
        return model, optimizers, lr_schedulers

    @override
    def teardown(self) -> None:
        try:
            self._formats.detach()
        finally:
            self._forget_run()
            self._ledger.disconnect()
            self.scaler.forget_steps()

    # The steps

    @override
    def forward_context(self) -> contextlib.AbstractContextManager[None]:
        return self._formats.forward()

    def replay_context(self) -> contextlib.AbstractContextManager[None]:
        """Everything within computes as a training step, also after a validation in other formats; between steps."""
        return self._formats.replay()

    def reference_context(self) -> contextlib.AbstractContextManager[None]:
        """As :meth:`replay_context`, but in fp32 or fp64, but for :attr:`not_in_fp32`: to compare with."""
        return self._formats.reference(self.not_in_fp32)

    def trial_context(self, policy: PrecisionPolicy) -> contextlib.AbstractContextManager[None]:
        """As :meth:`replay_context`, but under another policy, as :meth:`set_policy` takes it; the run stays as is."""
        return self._formats.trial(self._running_model(), policy)

    @override
    def convert_input(self, data: Any) -> Any:
        """Casts a batch for a LightningModule whose own operations compute in fp64; others take it as it comes."""
        return self._formats.cast_batch(data, self._current_model())

    @override
    @contextlib.contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        with self._formats.train_step(), self._ledger.batch():
            if self._buffers is not None:
                self._buffers.open()
            yield
        if (model := self._current_model()) is not None and not model.automatic_optimization:
            self.scaler.update(self._optimizers)

    @override
    def val_step_context(self) -> "contextlib._GeneratorContextManager[None, None, None]":
        return self._formats.eval_step()

    test_step_context = predict_step_context = val_step_context

    @override
    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Shows the hooks the loss as the user knows it, and hands on the scaled one."""
        self._formats.in_step = True
        self._ledger.begin_backward()
        return self.scaler.scale(Precision.pre_backward(self, tensor, module))

    @override
    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Runs backward outside autocast, so that in manual optimization, too, fp32 layers have fp32 gradients."""
        with self._formats.backward(model.device.type):
            super().backward(tensor, model, optimizer, *args, **kwargs)

    @override
    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        self._formats.in_step = not module.automatic_optimization
        self._ledger.end_backward()
        return super().post_backward(tensor, module)

    @override
    @taken_again
    def optimizer_step(
        self, optimizer: Optimizer, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        self._ledger.begin()
        self._formats.hand_over_added()
        evaluate, prepare = partial(self._evaluate, closure), partial(self._after_closure, model, optimizer)
        if self.scaler.is_active:
            with torch.enable_grad():
                closure_result = evaluate()
            self.scaler.unscale_(optimizer)
            prepare()
            skipped = self.scaler.step(optimizer, **kwargs)
        elif self.scaler.guards:
            closure_result, skipped = self.scaler.step_by_closure(optimizer, evaluate, prepare, **kwargs)
        else:
            closure_result, skipped = Precision.optimizer_step(self, optimizer, model, evaluate, **kwargs), False
        at_minimum = self.scaler.is_at_minimum() if skipped is not False else False
        if self._buffers is not None:
            self._buffers.close(optimizer, skipped)
        if model.automatic_optimization:
            self.scaler.update()
        elif self._buffers is not None:
            self._buffers.open()
        self._ledger.note(optimizer, skipped, at_minimum)
        return closure_result

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        result = self.step_errors.noting(closure)
        # Only now that the device has this batch's work: waiting for the last one's outcome leaves it no gap.
        self._ledger.settle_earlier_batches()
        return result

    @override
    def clip_gradients(self, optimizer: Optimizer, clip_val: int | float = 0.0, *args: Any, **kwargs: Any) -> None:
        if clip_val > 0:
            self.scaler.unscale_(raw(optimizer))
        super().clip_gradients(optimizer, clip_val, *args, **kwargs)

    # Checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return PluginState(
            configured=self._configured,
            policy=self._formats.training.to_dict() if self._formats.training is not None else {},
            history=self.history,
            steps=self._ledger.state_dict(),
            scaler=self.scaler.state_dict(),
        ).to_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the loss scale of a checkpoint of Lightning's own plugins, and weights in full precision."""
        self._resumed_step = checkpoint.get("global_step", 0)
        self._formats.restore_precise(checkpoint)
        if type(self).__qualname__ in checkpoint:
            return
        if (state := saved_state(checkpoint)) is not None:  # by a class of another name
            self.load_state_dict(state)
        else:
            self.scaler.load_state_dict(stock_scaler_state(checkpoint))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model = self._current_model()
        if model is None or not self._formats.is_attached:
            raise MixPrecError("The state of PerLayerPrecision can only be loaded while its Trainer is set up.")
        state = PluginState.from_dict(state_dict, whole=self.state_dict())
        if model.trainer.state.fn != TrainerFn.FITTING:
            if (moved := state.policy_to_resume(self._configured, "accept")) is not None:
                self._adopt(moved, "checkpoint")
            return
        assert (policy := self._formats.configured) is not None
        resumed = state.resumed(policy, self._configured, self._on_policy_change, model, self._resumed_step)
        self._adopt(resumed[0], "checkpoint")
        self._configured, self.history = resumed[1:]
        self.scaler.load_state_dict(state.scaler)
        self._ledger.load_state_dict(state.steps)
