"""Replays a training step without a trace: the same batch, weights and random numbers, in the run's formats or in fp32.

The replay runs in a sandbox (see ``instruments.sandbox``), outside DDP. What a LightningModule reaches through its
Trainer is a stand-in: ``self.log`` and loggers take nothing, ``self.manual_backward`` keeps the gradients to itself,
optimizers and schedules are copies (see ``instruments.optimizer_copies``), whose own methods do to the stand-ins what
they would do to the weights. Only ``step`` of an optimizer moves nothing: the gradients that it is called with are the
step's. In manual optimization every optimizer therefore sees the weights from before the step.
"""

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from types import MethodType
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, _configure_optimizers
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typing_extensions import Self

from lightning_mixprec.engine.objects import copied, mapped, tensors_in
from lightning_mixprec.engine.sharding import added_up, as_whole
from lightning_mixprec.errors import OtherRankError, SupportError, one_line
from lightning_mixprec.evidence.instruments.exact_fp32 import without_tf32
from lightning_mixprec.evidence.instruments.lockstep import Lockstep, together
from lightning_mixprec.evidence.instruments.memory import agree_on_room, is_out_of_memory
from lightning_mixprec.evidence.instruments.optimizer_copies import Copies
from lightning_mixprec.evidence.instruments.probe import cast_to_fp32
from lightning_mixprec.evidence.instruments.restoring.attributes import replaced
from lightning_mixprec.evidence.instruments.restoring.refusals import Quiet
from lightning_mixprec.evidence.instruments.sandbox import RandomState, Sandbox, sandbox
from lightning_mixprec.evidence.run_formats import Formats
from lightning_mixprec.optim.gradients import params_of
from lightning_mixprec.plugin.lightnings import both

_LIGHTNING_OPTIMIZERS = both("core.optimizer", "LightningOptimizer")
_STEPPED = (Optimizer, LRScheduler, *_LIGHTNING_OPTIMIZERS)
_NOT_THE_USERS = {"_trainer", "_fabric"}
_MOST_ITEMS = 100

T = TypeVar("T")


@dataclass
class Replayed:
    """Losses and gradients of a replayed step.

    Attributes:
        losses: What went backward, before scaling, in order; detached scalars on the device.
        gradients: By parameter name, times the loss scale; of several optimizers each one's, as it would have stepped.
    """

    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


class StepReplay:
    """Replays the training step of a LightningModule.

    Args:
        module: The LightningModule, with a Trainer or without.
        formats: In which formats it computes.
        device: The device it is on.
        kept: The names of the parameters whose gradients are kept; None for all.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        formats: Formats,
        device: torch.device,
        kept: Collection[str] | None = None,
    ) -> None:
        self.module, self.formats, self.device, self._kept = module, formats, device, kept

    @contextlib.contextmanager
    def opened(self, *, reference: bool = False, as_stored: bool = False) -> Generator[Sandbox, None, None]:
        """Formats and sandbox for one or several runs and what else is to be computed under the same conditions.

        Where weights are sharded all ranks open it together and run the same in it, to the end or none of them.

        Args:
            reference: Whether all is computed in fp32.
            as_stored: Whether sharded weights are gathered as they are stored, where the run has them in 16 bits.

        Raises:
            ReplayError: The step left a trace, which was put back, or one of this run did before.
        """
        agree_on_room(self.module, self.device, self._kept)
        context = self.formats.reference() if reference else self.formats.low()
        exact = without_tf32(self.device) if reference else contextlib.nullcontext()
        run, as_stored = self.module._trainer, as_stored or self.formats.is_trial
        optimizers = run.optimizers if run is not None else ()
        opening = sandbox(
            self.module, self.device, widen=reference, optimizers=optimizers, run=run, as_stored=as_stored
        )
        with together(self.module), torch.enable_grad(), context, exact, opening as stand_ins:
            if self._kept is not None:
                stand_ins.keep_gradients_of(self._kept)
            yield stand_ins

    def run(
        self,
        stand_ins: Sandbox,
        batch: Any,
        batch_idx: int,
        *,
        scale: float | Tensor = 1.0,
        random: RandomState | None = None,
    ) -> Replayed:
        """Runs the step once inside :meth:`opened`.

        Args:
            stand_ins: What :meth:`opened` gave.
            batch: The batch, on the device; it is not written to.
            batch_idx: Its index.
            scale: What losses are multiplied by before backward.
            random: The random numbers to begin with; None for the present ones.
        """
        own = self.own_batch(stand_ins, batch)
        return self.run_on_own(stand_ins, own, batch_idx, scale=scale, random=random)

    def own_batch(self, stand_ins: Sandbox, batch: Any) -> Any:
        """A copy of a batch, wide if the weights are."""
        own = copied(batch)
        return cast_to_fp32(own) if stand_ins.is_wide else own

    def run_on_own(
        self,
        stand_ins: Sandbox,
        batch: Any,
        batch_idx: int,
        *,
        scale: float | Tensor = 1.0,
        random: RandomState | None = None,
    ) -> Replayed:
        """As :meth:`run`, on an :meth:`own_batch`, which is written to if the step writes to its batch."""
        if random is not None:
            random.restore()
        step = _Step(self.module, stand_ins, scale)
        with _stand_ins_for_the_trainer(self.module, step):
            self._take(step, batch, batch_idx)
        return step.finish()

    def in_formats(self, formats: Formats) -> Self:
        """The same in other formats."""
        other = copy.copy(self)
        other.formats = formats
        return other

    def _take(self, step: "_Step", batch: Any, batch_idx: int) -> None:
        output = self._training_step(batch, batch_idx)
        loss = output.get("loss") if isinstance(output, dict) else output
        if self.module.automatic_optimization and isinstance(loss, Tensor):
            step.backward(loss / self._accumulated_batches())

    def _training_step(self, batch: Any, batch_idx: int) -> Any:
        training_step = self.module.training_step
        takes_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
        return training_step(batch, batch_idx) if takes_index else training_step(batch)

    def _accumulated_batches(self) -> int:
        trainer = self.module._trainer
        return trainer.accumulate_grad_batches if trainer is not None else 1


class _Step:
    """Collects what goes backward, optimizer by optimizer."""

    def __init__(self, module: pl.LightningModule, stand_ins: Sandbox, scale: float | Tensor) -> None:
        self.module, self.replayed = module, Replayed()
        self._stand_ins, self._scale = stand_ins, scale
        self._name_of = {id(stand_in): name for name, stand_in in stand_ins.parameters.items()}
        self._zeroed: dict[str, Tensor] = {}
        self.copies = Copies(stand_ins, _LIGHTNING_OPTIMIZERS, on_step=self.keep, on_zero=self.note_zeroed)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs backward of a loss, scaled, outside autocast."""
        self.replayed.losses.append(as_whole(loss.detach()))
        if loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):
                (loss * self._scale).backward(*args, **kwargs)

    def keep(self, optimizer: Any) -> None:
        """Keeps the gradients that an optimizer would step with."""
        for name, gradient in self._gradients(optimizer):
            self.replayed.gradients[name] = gradient.clone()
            self._zeroed.pop(name, None)

    def note_zeroed(self, optimizer: Any) -> None:
        """Notes gradients that nobody has stepped with, as far as is known: an optimizer may in a way of its own."""
        for name, gradient in self._gradients(optimizer):
            if name not in self.replayed.gradients:
                self._zeroed[name] = gradient.clone()

    def toggle(self, optimizer: Any, others: Iterable[Any]) -> None:
        """Gradients for one optimizer's parameters, none for the others'."""
        chosen = set(map(id, params_of(optimizer)))
        for other in others:
            for stand_in in params_of(other):
                stand_in.requires_grad_(id(stand_in) in chosen and stand_in.requires_grad)

    def untoggle(self) -> None:
        """Gradients for all that are trained."""
        for name, stand_in in self._stand_ins.parameters.items():
            stand_in.requires_grad_(name in self._stand_ins.trained)

    def refuse(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Refuses the step of an optimizer that holds weights of the run; one of the step's own may do as it likes."""
        if any(self._stand_ins.of(param) is not None for param in params_of(optimizer)):
            raise SupportError(
                f"training_step steps the run's {type(optimizer).__name__}, which it has from elsewhere than "
                "self.optimizers() or an attribute of the module, so that no replay can be kept from moving weights; "
                "let it take the optimizer from self.optimizers()"
            )

    def finish(self) -> Replayed:
        """What there is, with the gradients that no optimizer has stepped with; what knows this lets go of them."""
        for name, stand_in in self._stand_ins.parameters.items():
            if stand_in.grad is not None:
                self.replayed.gradients.setdefault(name, added_up(stand_in.grad.detach()))
                stand_in.grad = None
        for name, gradient in self._zeroed.items():
            self.replayed.gradients.setdefault(name, gradient)
        self._zeroed.clear()
        replayed, self.replayed = self.replayed, Replayed()
        return replayed

    def _gradients(self, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        for stand_in in params_of(optimizer):
            if stand_in.grad is not None and id(stand_in) in self._name_of:
                yield self._name_of[id(stand_in)], added_up(stand_in.grad.detach())


@contextlib.contextmanager
def _stand_ins_for_the_trainer(module: pl.LightningModule, step: _Step) -> Generator[None, None, None]:
    trainer, run = module._trainer, _OfRun(module, step)
    with contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(step.refuse).remove)
        stack.enter_context(replaced(vars(module), run.for_module()))
        if trainer is not None:
            stack.enter_context(replaced(vars(trainer.strategy), run.for_strategy()))
            stack.callback(setattr, trainer, "should_stop", trainer.should_stop)
            stack.callback(setattr, trainer, "loggers", trainer.loggers)
            quiet: list[Any] = [Quiet(each) for each in trainer.loggers]
            trainer.loggers = quiet
        yield


class _OfRun:
    """The copies of a run's optimizers and schedules, and what reaches them."""

    def __init__(self, module: pl.LightningModule, step: _Step) -> None:
        self._module, self._step, self._trainer = module, step, module._trainer

    def for_module(self) -> dict[str, Any]:
        """Attributes for the module."""
        step, attributes = self._step, vars(self._module)
        own = {name: value for name, value in attributes.items() if name not in _NOT_THE_USERS}
        return {
            **{name: step.copies.of(value) for name, value in own.items() if _reaches_optimizer(value)},
            **dict.fromkeys(("log", "log_dict", "print", "clip_gradients"), _nothing),
            "optimizers": self._optimizers,
            "lr_schedulers": self._lr_schedulers,
            "manual_backward": step.backward,
            "toggle_optimizer": lambda optimizer: step.toggle(optimizer, self._configured[0]),
            "untoggle_optimizer": lambda optimizer: step.untoggle(),
        }

    def for_strategy(self) -> dict[str, Any]:
        """Attributes for the strategy, of which the Trainer has its optimizers."""
        assert self._trainer is not None
        strategy, of = self._trainer.strategy, self._step.copies.of
        configs = [replace(each, scheduler=of(each.scheduler)) for each in strategy.lr_scheduler_configs]
        return {
            "_optimizers": [of(each) for each in strategy._optimizers],
            "_lightning_optimizers": [of(each) for each in strategy._lightning_optimizers],
            "lr_scheduler_configs": configs,
        }

    def _optimizers(self, use_pl_optimizer: bool = True) -> Any:
        wrapped, plain, _ = self._configured
        return _one_or_all(wrapped if use_pl_optimizer else plain)

    def _lr_schedulers(self) -> Any:
        return _one_or_all(self._configured[2]) if self._configured[2] else None

    @functools.cached_property
    def _configured(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Optimizers with Lightning's wrapper around them and without, and schedules."""
        of, trainer = self._step.copies.of, self._trainer
        if trainer is not None:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            return list(trainer.strategy._lightning_optimizers), list(trainer.optimizers), schedules
        configured: Any = self._module.configure_optimizers()
        optimizers, schedules, _ = _configure_optimizers(configured)
        wrapped = list(map(LightningOptimizer, optimizers))
        for each in wrapped:
            each._strategy = _NoStrategy(self._module)  # type: ignore[assignment]
        plain = [each["scheduler"] if isinstance(each, dict) else each for each in schedules]
        return list(map(of, wrapped)), list(map(of, optimizers)), list(map(of, plain))


@dataclass
class _NoStrategy:
    """Stands in for the strategy of optimizers that have no Trainer, which ``toggle_model`` asks for the module."""

    lightning_module: pl.LightningModule


def _one_or_all(made: list[Any]) -> Any:
    return made[0] if len(made) == 1 else list(made)


def _reaches_optimizer(value: Any, depth: int = 2) -> bool:
    """True for an optimizer or a schedule, and for a method, a container or an object that holds one."""
    if isinstance(value, MethodType):
        value = value.__self__
    if type(value) in weakref.ProxyTypes or isinstance(value, (nn.Module, type)):
        return False
    if depth == 0 or isinstance(value, _STEPPED):
        return isinstance(value, _STEPPED)
    held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    attributes = vars(value).values() if hasattr(value, "__dict__") else ()
    return any(_reaches_optimizer(each, depth - 1) for each in (*islice(held, _MOST_ITEMS), *attributes))


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def halved(batch: Any) -> Any:
    """The first half of a batch: of every tensor as long as its first one; itself if there is none to halve."""
    lengths = [len(tensor) for tensor in tensors_in(batch) if _has_rows(tensor)]
    if not lengths or lengths[0] < 2:
        return batch
    length = lengths[0]
    return mapped(
        batch, lambda tensor: tensor[: length // 2] if _has_rows(tensor) and len(tensor) == length else tensor
    )


def _has_rows(tensor: Tensor) -> bool:
    """True for tensors that can be sliced; sparse and nested ones cannot."""
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.dim() > 0


class Halving:
    """A batch to run something on: half of it, from when memory ran out.

    All ranks run the same, each on its own batch. Where what is run sends messages to all ranks, it is run on half of
    the batch by all of them or by none.

    Args:
        module: The LightningModule that it is run through.
        batch: The batch, on the device.

    Attributes:
        batch: What is left of it.
        lockstep: In which ranks replay it.
        shortage: The error that said that memory ran out, in one line; None if none did.
    """

    def __init__(self, module: pl.LightningModule, batch: Any) -> None:
        self._module, self.batch = module, batch
        self.lockstep, self._runs = Lockstep(module), 0
        self.shortage: str | None = None

    def run(self, run: Callable[[Any], T]) -> T:
        """Runs something on the batch; if memory runs out, once more on half of it, and so from then on."""
        self._runs += 1
        once_more = f"{self._runs} on half"
        try:
            with self.lockstep.attempt(f"{self._runs}", is_repeated=self.shortage is None):
                return run(self.batch)
        except Exception as error:
            is_short = error.is_out_of_memory if isinstance(error, OtherRankError) else is_out_of_memory(error)
            if self.shortage is not None or not is_short:
                self.lockstep.call_off(once_more, error)
                raise
            self.shortage = one_line(error)
        self.batch = halved(self.batch)
        if self._module.device.type == "cuda":
            torch.cuda.empty_cache()
        with self.lockstep.attempt(once_more):
            return run(self.batch)
