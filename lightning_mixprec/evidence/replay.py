"""Replays a training step without a trace: the same batch, weights and random numbers, in the run's formats or in fp32.

The replay runs in a sandbox (see ``instruments.sandbox``), outside DDP, with stand-ins for what a
LightningModule reaches through its Trainer: ``self.log`` and loggers take nothing, optimizers and schedules do not
step, ``self.manual_backward`` keeps the gradients to itself. In manual optimization every optimizer therefore sees the
weights from before the step.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_mixprec import ranks
from lightning_mixprec.engine.objects import copied, mapped, tensors_in
from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.errors import SupportError, one_line
from lightning_mixprec.evidence.instruments.exact_fp32 import without_tf32
from lightning_mixprec.evidence.instruments.memory import free_host_bytes, is_out_of_memory
from lightning_mixprec.evidence.instruments.probe import cast_to_fp32
from lightning_mixprec.evidence.instruments.sandbox import RandomState, Sandbox, sandbox
from lightning_mixprec.evidence.run_formats import Formats
from lightning_mixprec.plugin.lightnings import DummyLogger

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
    """

    def __init__(self, module: pl.LightningModule, formats: Formats, device: torch.device) -> None:
        self.module, self.formats, self.device = module, formats, device

    @contextlib.contextmanager
    def opened(self, *, reference: bool = False) -> Generator[Sandbox, None, None]:
        """Formats and sandbox for one or several runs and what else is to be computed under the same conditions."""
        _agree_on_room(self.module, self.device)
        context = self.formats.reference() if reference else self.formats.low()
        exact = without_tf32(self.device) if reference else contextlib.nullcontext()
        widen = reference and self.formats.widens
        with torch.enable_grad(), context, exact, sandbox(self.module, self.device, widen=widen) as stand_ins:
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
        replayed = Replayed()
        step = _Step(self.module, stand_ins, replayed, scale)
        with _stand_ins_for_the_trainer(self.module, step):
            output = self._training_step(batch, batch_idx)
            loss = output.get("loss") if isinstance(output, dict) else output
            if self.module.automatic_optimization and isinstance(loss, Tensor):
                step.backward(loss / self._accumulated_batches())
        step.finish()
        return replayed

    def _training_step(self, batch: Any, batch_idx: int) -> Any:
        training_step = self.module.training_step
        takes_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
        return training_step(batch, batch_idx) if takes_index else training_step(batch)

    def _accumulated_batches(self) -> int:
        trainer = self.module._trainer
        return trainer.accumulate_grad_batches if trainer is not None else 1


class _Step:
    """Collects what goes backward, optimizer by optimizer."""

    def __init__(
        self, module: pl.LightningModule, stand_ins: Sandbox, replayed: Replayed, scale: float | Tensor
    ) -> None:
        self.module, self.replayed = module, replayed
        self._stand_ins, self._scale = stand_ins, scale
        self._name_of = {id(stand_in): name for name, stand_in in stand_ins.parameters.items()}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs backward of a loss, scaled, outside autocast."""
        self.replayed.losses.append(loss.detach())
        if loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):
                (loss * self._scale).backward(*args, **kwargs)

    def zero_grad(self, parameters: Iterable[Tensor]) -> None:
        """Forgets the gradients of an optimizer's parameters."""
        for stand_in in self._of(parameters):
            stand_in.grad = None

    def keep(self, parameters: Iterable[Tensor]) -> None:
        """Keeps the gradients that an optimizer would step with."""
        for stand_in in self._of(parameters):
            if stand_in.grad is not None:
                self.replayed.gradients[self._name_of[id(stand_in)]] = stand_in.grad.detach().clone()

    def toggle(self, optimizer: "_Optimizer", others: Iterable["_Optimizer"]) -> None:
        """Gradients for one optimizer's parameters, none for the others'."""
        chosen = {id(stand_in) for stand_in in self._of(optimizer.parameters)}
        for other in others:
            for stand_in in self._of(other.parameters):
                stand_in.requires_grad_(id(stand_in) in chosen and stand_in.requires_grad)

    def untoggle(self) -> None:
        """Gradients for all that are trained."""
        for name, stand_in in self._stand_ins.parameters.items():
            stand_in.requires_grad_(name in self._stand_ins.trained)

    def finish(self) -> None:
        """Keeps the gradients that no optimizer has stepped with."""
        for name, stand_in in self._stand_ins.parameters.items():
            if stand_in.grad is not None:
                self.replayed.gradients.setdefault(name, stand_in.grad.detach())
                stand_in.grad = None

    def _of(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        for parameter in parameters:
            if id(parameter) in self._name_of:
                yield parameter
            elif (stand_in := self._stand_ins.of(parameter)) is not None:
                yield stand_in


class _Optimizer:
    """Stands in for an optimizer whose step is not to change anything."""

    def __init__(self, optimizer: Any, step: _Step) -> None:
        self._optimizer, self._step = optimizer, step
        self.param_groups = [dict(group) for group in optimizer.param_groups]

    @property
    def optimizer(self) -> "_Optimizer":
        """The optimizer inside Lightning's wrapper: it is not to step, either."""
        return self

    @property
    def parameters(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._step.keep(self.parameters)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._step.zero_grad(self.parameters)

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None, None, None]:
        self._step.module.toggle_optimizer(self)  # type: ignore[arg-type]
        yield
        self._step.module.untoggle_optimizer(self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class _Schedule:
    """Stands in for a learning-rate schedule that is not to move."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)


@contextlib.contextmanager
def _stand_ins_for_the_trainer(module: pl.LightningModule, step: _Step) -> Generator[None, None, None]:
    trainer = module._trainer
    given = {name: vars(module)[name] for name in _REPLACED if name in vars(module)}
    vars(module).update(_replacements(module, trainer, step))
    loggers, should_stop = (trainer.loggers, trainer.should_stop) if trainer is not None else ([], False)
    if trainer is not None:
        trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        if trainer is not None:
            trainer.loggers, trainer.should_stop = loggers, should_stop
        for name in _REPLACED:
            vars(module).pop(name, None)
        vars(module).update(given)


_REPLACED = (
    "log",
    "log_dict",
    "print",
    "optimizers",
    "lr_schedulers",
    "manual_backward",
    "clip_gradients",
    "toggle_optimizer",
    "untoggle_optimizer",
)


def _replacements(module: pl.LightningModule, trainer: pl.Trainer | None, step: _Step) -> dict[str, Any]:
    made: list[_Optimizer] = []
    schedules: list[_Schedule] = []

    def make() -> None:
        if not made:
            optimizers, schedulers = _configured(module, trainer)
            made.extend(_Optimizer(optimizer, step) for optimizer in optimizers)
            schedules.extend(map(_Schedule, schedulers))

    def optimizers(use_pl_optimizer: bool = True) -> Any:
        make()
        return made[0] if len(made) == 1 else list(made)

    def lr_schedulers() -> Any:
        make()
        return None if not schedules else schedules[0] if len(schedules) == 1 else list(schedules)

    def toggle_optimizer(optimizer: Any) -> None:
        make()
        step.toggle(_Optimizer(optimizer, step), made)

    def untoggle_optimizer(optimizer: Any) -> None:
        step.untoggle()

    functions = (optimizers, lr_schedulers, step.backward, _nothing, toggle_optimizer, untoggle_optimizer)
    return dict(zip(_REPLACED, (_nothing, _nothing, _nothing, *functions), strict=True))


def _configured(module: pl.LightningModule, trainer: pl.Trainer | None) -> tuple[list[Any], list[Any]]:
    """The optimizers of a module and its learning-rate schedules."""
    if trainer is not None:
        return list(trainer.optimizers), [config.scheduler for config in trainer.lr_scheduler_configs]
    configured: Any = module.configure_optimizers()
    optimizers, schedules, _ = _configure_optimizers(configured)
    return list(optimizers), [each["scheduler"] if isinstance(each, dict) else each for each in schedules]


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _agree_on_room(module: pl.LightningModule, device: torch.device) -> None:
    """Raises on all ranks if one has no room for the whole of weights that are sharded."""
    sharded = [param for param in module.parameters() if is_sharded(param)]
    if not sharded:
        return
    needed = sum(param.numel() * param.element_size() for param in sharded)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes() // ranks.count()
    if ranks.is_any(needed > free, device):
        raise SupportError(
            f"the weights are sharded, and to replay a step each rank needs the whole of them ({needed / 2**30:.1f} "
            "GiB), which do not fit beside the run"
        )


def is_shared(module: pl.LightningModule) -> bool:
    """True where ranks have to replay together, because each holds a part of the weights."""
    return any(map(is_sharded, module.parameters()))


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

    Args:
        module: The LightningModule that it is run through.
        batch: The batch, on the device.

    Attributes:
        batch: What is left of it.
        shortage: The error that said that memory ran out, in one line; None if none did.
    """

    def __init__(self, module: pl.LightningModule, batch: Any) -> None:
        self._module, self.batch = module, batch
        self.shortage: str | None = None

    def run(self, run: Callable[[Any], T]) -> T:
        """Runs something on the batch; if memory runs out, once more on half of it, and so from then on."""
        try:
            return run(self.batch)
        except Exception as error:
            if self.shortage is not None or is_shared(self._module) or not is_out_of_memory(error):
                raise
            self.shortage = one_line(error)
        self.batch = halved(self.batch)
        if self._module.device.type == "cuda":
            torch.cuda.empty_cache()
        return run(self.batch)
