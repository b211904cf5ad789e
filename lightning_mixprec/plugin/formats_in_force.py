"""The policies of training and of evaluation, each brought in force on the running model when it is to hold."""

import contextlib
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mixprec.engine import sharding
from lightning_mixprec.engine.apply import Attachment, attach
from lightning_mixprec.engine.backends import Backends, Emulate, check_emulate
from lightning_mixprec.engine.casting import cast_floating
from lightning_mixprec.engine.compiling import uncompiled
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import REFERENCE, get_format, is_wider
from lightning_mixprec.plugin.arguments import (
    check_averages,
    check_running,
    check_storage_unchanged,
    choose_format,
)
from lightning_mixprec.plugin.narrow_weights import NarrowWeights
from lightning_mixprec.plugin.notices import warn_of_whole_copies
from lightning_mixprec.plugin.strategies import data_parallel_mesh
from lightning_mixprec.policy.assignment import Assignment, LayerPrecision
from lightning_mixprec.policy.policy import PrecisionPolicy


class FormatsInForce:
    """The policies of a plugin, and what they mean for the model that runs.

    Without an evaluation policy the one of training holds in evaluation, too. What was resolved can still be read
    after :meth:`detach`.

    Args:
        training: Policy of training; None until the device is known.
        evaluation: Policy of validate, test and predict, if they have one of their own.
        emulate: Which 16-bit formats are emulated, as :func:`~lightning_mixprec.engine.apply.attach` takes it.

    Raises:
        MixPrecError: ``emulate`` is none of what it may be.
    """

    def __init__(
        self, training: PrecisionPolicy | None, evaluation: PrecisionPolicy | None, emulate: Emulate = "auto"
    ) -> None:
        check_emulate(emulate)
        self.configured = self.training = training
        self.evaluation = evaluation
        self.emulate = emulate
        self.chosen = ""
        self.training_assignment: Assignment | None = None
        self.evaluation_assignment: Assignment | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._attachment: Attachment | None = None
        self._narrow: NarrowWeights | None = None
        self._in_force: Assignment | None = None
        self._to_watch = {"train", "eval"}
        self._in_evaluation = False
        self._is_lent = False
        self.in_step = False

    @property
    def policy(self) -> PrecisionPolicy | None:
        """The policy in force."""
        return self.evaluation if self._in_evaluation and self.evaluation is not None else self.training

    @property
    def assignment(self) -> Assignment | None:
        """The policy in force, resolved."""
        return self._assignment_of("eval" if self._in_evaluation else "train")

    @property
    def resolved_for_training(self) -> Assignment:
        """The assignment of training, once a model runs."""
        assert self.training_assignment is not None
        return self.training_assignment

    @property
    def lightning_name(self) -> str:
        """Lightning's name for the default format."""
        return get_format(REFERENCE if self.training is None else self.training.default).use.lightning_name

    @property
    def defaults(self) -> tuple[str, str]:
        """The default formats of training and of evaluation, once they are known."""
        assert self.training is not None
        return self.training.default, (self.evaluation or self.training).default

    @property
    def is_attached(self) -> bool:
        """True while a model runs."""
        return self._attachment is not None

    def between_steps(self, model: pl.LightningModule | None, what: str) -> pl.LightningModule:
        """The model, if it runs, no step of it does, and its formats are its own; ``what`` begins an error."""
        self._check_not_lent()
        return check_running(model if self.is_attached else None, self.in_step, what)

    def known_on(self, device: torch.device) -> PrecisionPolicy:
        """The policy of training, which ``"auto"`` leaves to the device."""
        if self.training is None:
            default, self.chosen = choose_format(device)
            self.configured = self.training = PrecisionPolicy(default)
        return self.training

    def resolve(self, model: pl.LightningModule) -> tuple[Assignment, Assignment | None]:
        """Resolves both policies against the model that is about to run; raises if they store weights differently."""
        device = model.trainer.strategy.root_device
        self.backends = Backends(device.type, self.emulate)
        self.training_assignment = self.known_on(device).resolve(model)
        check_averages(model, self.training_assignment)
        self.evaluation_assignment = None if self.evaluation is None else self.evaluation.resolve(model)
        if self.evaluation_assignment is not None:
            check_storage_unchanged(self.training_assignment, self.evaluation_assignment)
        return self.training_assignment, self.evaluation_assignment

    def shard(self, model: pl.LightningModule, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        """Shards modules of a model over the strategy's mesh, or the one in the options, as training gathers them."""
        strategy = model.trainer.strategy
        assignment = self.known_on(strategy.root_device).resolve(model)
        options = {"mesh": data_parallel_mesh(strategy), **options}
        warn_of_whole_copies(model, options["mesh"], model.trainer.world_size)
        sharding.shard(model, modules, assignment, **options)

    def attach(self, model: pl.LightningModule, device_type: str) -> None:
        """Makes the model obey the policy of training."""
        self._attachment = attach(model, self.resolved_for_training, device_type, self.emulate)
        self._in_force = self.training_assignment

    def hand_over(self, model: pl.LightningModule, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Gives optimizers what the weights that they change have lost by being stored in 16 bits; returns them."""
        if self._attachment is not None:
            self._narrow = NarrowWeights(model, self._attachment, self.resolved_for_training, optimizers)
            self._narrow.hand_over()
        return optimizers

    def hand_over_added(self) -> None:
        """The same for weights that were added to optimizers since."""
        if self._narrow is not None:
            self._narrow.hand_over()

    def full_weights(self, model: pl.LightningModule) -> contextlib.AbstractContextManager[None]:
        """Weights that rules store in 16 bits are in fp32 within, with all their bits."""
        assert self._attachment is not None
        return (self._narrow or NarrowWeights(model, self._attachment, self.resolved_for_training, [])).full()

    def detach(self) -> None:
        """Gives the model back as it was."""
        try:
            if self._attachment is not None:
                self._attachment.detach()
            if self._narrow is not None:
                self._narrow.give_back()
        finally:
            self._forget_run()

    def amended(self, edits: Mapping[str, Any], model: pl.LightningModule) -> PrecisionPolicy:
        """The policy of training with edits in it, which decide first."""
        assert self.training is not None
        return self.training.amend(edits, model)

    def replace(self, policy: PrecisionPolicy, assignment: Assignment) -> None:
        """Another policy for training; holds at once, or raises and the old one holds."""
        self._bring_in_force(assignment)
        self.training, self.training_assignment = policy, assignment

    def restore_precise(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes over weights of a checkpoint that has more bits of them than the model that loaded them."""
        weights = checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))
        if self._attachment is not None:
            self._attachment.restore_precise(weights)
        if self._narrow is not None:
            self._narrow.restore(weights, checkpoint.get("optimizer_states", []))

    def cast_batch(self, data: Any, model: pl.LightningModule | None) -> Any:
        """A batch, cast if the LightningModule's own operations compute wider than fp32; others take it as it comes."""
        assignment = self._assignment_of("train" if model is None or model.trainer.training else "eval")
        if assignment is None or not is_wider(assignment[""].region, REFERENCE):
            return data
        return cast_floating(data, get_format(assignment[""].region).forward.dtype)

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes in the formats in force."""
        return self._attachment.context() if self._attachment is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def backward(self, device_type: str) -> Generator[None, None, None]:
        """Backward runs outside autocast within, and what checkpointing computes anew there, it computes as before."""
        with contextlib.ExitStack() as stack:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            if self._attachment is not None:
                stack.enter_context(self._attachment.backward_context())
            yield

    def replay(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes as a step of training does, whatever ran before; between steps."""
        self._bring_in_force(self.training_assignment)
        return self.forward()

    @contextlib.contextmanager
    def reference(self, but_for: Collection[str] = ()) -> Generator[None, None, None]:
        """As :meth:`replay`, but in fp32, and in fp64 what is to compute in fp64; see :func:`all_in_fp32`."""
        assignment = self.training_assignment
        self._bring_in_force(assignment)
        if self._attachment is None or assignment is None:
            yield
            return
        with self._lent_to(all_in_fp32(assignment, but_for)):
            yield

    @contextlib.contextmanager
    def trial(self, model: pl.LightningModule, policy: PrecisionPolicy) -> Generator[None, None, None]:
        """As :meth:`replay`, but under another policy for the running model."""
        self._bring_in_force(self.training_assignment)
        assignment = policy.resolve(model)
        check_storage_unchanged(self.resolved_for_training, assignment)
        stored = [(buffer, buffer.data) for buffer in model.buffers()]
        try:
            with self._lent_to(assignment):
                # Buffers of layers in fp64 are fp64, and would come back rounded where the trial has them narrower.
                stored = [(buffer, data) for buffer, data in stored if buffer.dtype != data.dtype]
                yield
        finally:
            for buffer, data in stored:
                buffer.data = data

    @contextlib.contextmanager
    def _lent_to(self, assignment: Mapping[str, LayerPrecision]) -> Generator[None, None, None]:
        """Another assignment is in force within, uncompiled, and nothing can bring a third one in force."""
        attachment, in_force = self._attachment, self._in_force
        assert attachment is not None and in_force is not None
        try:
            attachment.change(assignment, is_lent=True)
            self._is_lent = True
            with uncompiled(), self.forward():
                yield
        finally:
            self._is_lent = False
            attachment.change(in_force)

    def train_step(self) -> contextlib.AbstractContextManager[None]:
        """A step of training."""
        return self._step("train")

    @contextlib.contextmanager
    def eval_step(self) -> Generator[None, None, None]:
        """A step of validate, test or predict.

        FSDP2 keeps what it gathers weights into, and could not train with what inference mode had made.
        """
        self._in_evaluation = True
        gathers = self._attachment is not None and self._attachment.is_sharded
        try:
            with contextlib.ExitStack() as stack:
                if gathers:
                    stack.enter_context(torch.inference_mode(False))
                    stack.enter_context(torch.no_grad())
                stack.enter_context(self._step("eval"))
                yield
        finally:
            self._in_evaluation = False

    @contextlib.contextmanager
    def _step(self, stage: Literal["train", "eval"]) -> Generator[None, None, None]:
        """Watches the first step of its kind: every border has to be entered, unless the step fails by itself."""
        self._bring_in_force(self._assignment_of(stage))
        watching = self._attachment if stage in self._to_watch else None
        if watching is not None:
            self._to_watch.discard(stage)
            watching.begin_first_step()
        self.in_step, failed = True, True
        try:
            with self.forward():
                yield
            failed = False
        finally:
            self.in_step = False
            if watching is not None:
                with contextlib.suppress(PolicyError) if failed else contextlib.nullcontext():
                    watching.end_first_step()

    def _assignment_of(self, stage: Literal["train", "eval"]) -> Assignment | None:
        if stage == "eval" and self.evaluation_assignment is not None:
            return self.evaluation_assignment
        return self.training_assignment

    def _bring_in_force(self, assignment: Assignment | None) -> None:
        self._check_not_lent()
        if self._attachment is not None and assignment is not None and self._in_force is not assignment:
            self._attachment.change(assignment)
            self._in_force = assignment

    def _check_not_lent(self) -> None:
        if self._is_lent:
            raise PolicyError(
                "Formats were to be put in force inside trial_context or reference_context, which compute in formats "
                "of their own; leave the context first."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no run."""
        return attributes_of_copy(self)


def all_in_fp32(assignment: Mapping[str, LayerPrecision], but_for: Collection[str] = ()) -> dict[str, LayerPrecision]:
    """The assignment where everything computes in fp32; fp64 stays.

    Args:
        assignment: The assignment.
        but_for: Layers whose own operations stay as they are. What is inside them hands on what these take: 16 bits.
    """

    def wide(name: str, layer: LayerPrecision) -> LayerPrecision:
        is_inside = get_format(layer.region).is_half and any(name.startswith(f"{outer}.") for outer in but_for)
        compute = layer.compute if is_wider(layer.compute, REFERENCE) else REFERENCE
        return replace(layer, compute=compute, output=layer.region if is_inside else None)

    return {name: layer if name in but_for else wide(name, layer) for name, layer in assignment.items()}


def attributes_of_copy(owner: Any) -> dict[str, Any]:
    """Attributes of a copy of the plugin or of a part of it: all, with the run forgotten (``_forget_run``)."""
    copy: Any = object.__new__(type(owner))
    vars(copy).update(vars(owner))
    copy._forget_run()
    return dict(vars(copy))
