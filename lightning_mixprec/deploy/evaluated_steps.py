"""A module's own step on batches in eval mode, without gradients and without a trace: losses, outputs, what it logs."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_mixprec.deploy.prepared import GivenBatch
from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.evaluation import validation_output
from lightning_mixprec.evidence.instruments.sandbox import RandomState, Sandbox
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import Formats
from lightning_mixprec.numerics.devices.timing import wait_for

Step = Literal["training", "validation"]


class Logged(NamedTuple):
    """A value that a step logged: a number, a tensor or a torchmetrics metric, and how it is reduced over batches."""

    value: Any
    reduce: Any
    size: int | None


@dataclass
class Seen:
    """What a step came to.

    Attributes:
        loss: Its loss, in fp64; None if it has none.
        seconds: How long it took.
        output: What ``forward``, or the last top-level child that was called, returned; None if that was not asked for.
        logged: What it logged, by name.
    """

    loss: float | None
    seconds: float
    output: Any = None
    logged: dict[str, Logged] = field(default_factory=dict)


class EvaluatedStep(StepReplay):
    """Runs a module's ``training_step`` or ``validation_step`` in eval mode, without gradients unless asked for.

    Args:
        module: The LightningModule.
        formats: In which formats it computes.
        device: The device it is on.
        step: Which of its steps.

    Attributes:
        takes_gradients: Whether the step takes gradients itself, and is run with them.
    """

    def __init__(self, module: pl.LightningModule, formats: Formats, device: torch.device, step: Step) -> None:
        super().__init__(module, formats, device)
        self._kind, self._loader = step, 0
        self.takes_gradients = self._with_gradients = False
        self._watch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self._outputs: _Outputs | None = None
        self._seen = Seen(None, 0.0)

    @contextlib.contextmanager
    def opened_for_evaluation(
        self, weights: Callable[[pl.LightningModule], None], *, is_exact: bool
    ) -> Iterator[Sandbox]:
        """As :meth:`opened`, in eval mode, and with the weights that a function gives to the module.

        Args:
            weights: Gives the module those that it is to compute with; they are gone with the sandbox.
            is_exact: Whether it is the fp32 that others are compared with: no TF32, 16-bit weights widened.
        """
        with self.opened(reference=is_exact) as stand_ins:
            weights(self.module)
            self.module.eval()
            yield stand_ins

    @contextlib.contextmanager
    def seeing_outputs(self) -> Iterator[None]:
        """Within, steps are asked for their outputs, too."""
        with _Outputs(self.module) as self._outputs:
            try:
                yield
            finally:
                self._outputs = None

    def see(
        self,
        stand_ins: Sandbox,
        given: GivenBatch,
        random: RandomState | None = None,
        *,
        watch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        with_gradients: bool = False,
    ) -> Seen:
        """Runs the step once.

        Args:
            stand_ins: What :meth:`opened_for_evaluation` gave.
            given: The batch.
            random: The random numbers to begin with; None for the present ones.
            watch: What is entered around the step itself.
            with_gradients: Whether the step records what a backward would need.
        """
        self._loader, self._watch, self._with_gradients = given.loader, watch, with_gradients
        replayed = self.run(stand_ins, given.batch, given.batch_idx, random=random)
        if self._seen.loss is None and replayed.losses:  # of manual optimization: what went backward
            self._seen.loss = sum(float(loss) for loss in replayed.losses)
        return self._seen

    def call(self, hook: str, *args: Any) -> dict[str, Logged]:
        """Calls one of the module's hooks around validation; returns what it logged."""
        logged: dict[str, Logged] = {}
        vars(self.module).update(_logging_into(logged))
        with torch.no_grad():
            getattr(self.module, hook)(*args)
        return logged

    @property
    def is_validation(self) -> bool:
        """Whether it runs ``validation_step``."""
        return self._kind == "validation"

    def _take(self, step: Any, batch: Any, batch_idx: int) -> None:
        logged: dict[str, Logged] = {}
        vars(self.module).update(_logging_into(logged))
        if self._outputs is not None:
            self._outputs.begin()
        run = self._validation_step if self.is_validation else self._training_step
        with torch.set_grad_enabled(self._with_gradients or self.takes_gradients), self._watch():
            begin = self._now()
            output = run(batch, batch_idx)
            seconds = self._now() - begin
        loss = output.get("loss") if isinstance(output, Mapping) else output
        loss = _number(loss) if loss is not None else _logged_loss(logged) if self.is_validation else None
        seen = self._outputs.seen if self._outputs is not None else None
        self._seen = Seen(loss, seconds, seen, logged)

    def _validation_step(self, batch: Any, batch_idx: int) -> Any:
        return validation_output(self.module, batch, batch_idx, self._loader)

    def _now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


class _Outputs:
    """Looks at what ``forward`` hands on, and what top-level children do; scalars, as losses and metrics are, apart."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._forward: Any = None
        self._child: Any = None
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> "_Outputs":
        self._hooks.callback(self._module.register_forward_hook(self._take_forward).remove)
        for child in _called_children(self._module):
            self._hooks.callback(child.register_forward_hook(self._take_child).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def begin(self) -> None:
        """Forgets what an earlier step handed on."""
        self._forward = self._child = None

    @property
    def seen(self) -> Any:
        """What ``forward`` returned in the step, else what the last of the top-level children that were called did."""
        return self._forward if self._forward is not None else self._child

    def _take_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._forward = output

    def _take_child(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if any(tensor.dim() for tensor in tensors_in(output)):
            self._child = output


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    """The top-level children; those inside lists and mappings, which are never called themselves."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_children(child)
        else:
            yield child


def lacks_gradients(error: BaseException) -> bool:
    """True for the error of a step that takes gradients itself (of its inputs, say) where none are recorded."""
    while isinstance(error, MixPrecError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, RuntimeError) and "does not require grad" in str(error)


def _logging_into(logged: dict[str, Logged]) -> dict[str, Any]:
    """What stands in for a module's ``log`` and ``log_dict``."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        value = value.detach() if isinstance(value, Tensor) else value
        logged[name] = Logged(value, kwargs.get("reduce_fx", "mean"), kwargs.get("batch_size"))

    def log_dict(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            log(name, value, *args, **kwargs)

    return {"log": log, "log_dict": log_dict}


def _logged_loss(logged: Mapping[str, Logged]) -> float | None:
    """The first logged value that is called a loss."""
    found = (each.value for name, each in logged.items() if "loss" in name.lower())
    value = next((each for each in found if isinstance(each, (int, float, Tensor))), None)
    return None if value is None else _number(value)


def _number(loss: Any) -> float:
    if isinstance(loss, Tensor) and loss.numel() == 1 or isinstance(loss, (int, float)):
        return float(loss)
    said = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise MixPrecError(f"the step returns {said}; compare() takes a loss, or a dict with one under 'loss'.")
