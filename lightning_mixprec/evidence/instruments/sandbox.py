"""A model's step run without a trace: on stand-ins for its weights and buffers, with everything else put back.

While a sandbox is open the model holds copies of its parameters and buffers, so whatever the step does to them (running
statistics, an averaged copy of the weights, clipped weights, gradients) is gone with the copies. Random numbers and the
modules' Python attributes are recorded before and put back after.

What cannot be put back, an iterator or a queue, answers the step with an error, so that nothing is taken from it (see
``restoring.refusals``). Not seen at all is what neither attributes of the modules lead to nor the user's own code names
(see ``restoring.code_names``), and the state of objects that are written in C.
"""

import contextlib
import random
import sys
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from lightning_mixprec import ranks
from lightning_mixprec.engine import sharding
from lightning_mixprec.engine.compiling import uncompiled
from lightning_mixprec.engine.lent_shards import LentShards, with_local_part
from lightning_mixprec.errors import MixPrecError, ReplayError, SupportError, TraceLeftError
from lightning_mixprec.evidence.instruments.restoring import code_names, waiting
from lightning_mixprec.evidence.instruments.restoring.attributes import Attributes
from lightning_mixprec.evidence.instruments.restoring.contents import version_of
from lightning_mixprec.evidence.instruments.restoring.guard import Guard
from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.numerics.formats import half_dtypes


class RandomState:
    """Random number generators as they were when this was made: torch's on the CPU and on one device, and all others.

    Reading torch's takes a microsecond and does not wait for the device; Python's and NumPy's take fifty times as long.

    Args:
        device: The device beside the CPU.
        others: Whether the generators of Python and NumPy are recorded, too.
    """

    def __init__(self, device: torch.device, *, others: bool = True) -> None:
        self.device, self._torch = device, torch.get_rng_state()
        self._cuda = device if device.type == "cuda" else None
        self._device = torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None
        self._python = random.getstate() if others else None
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if others and numpy is not None else None

    def is_same(self, other: "RandomState") -> bool:
        """True if torch's generators were in the same state when the other was made."""
        if not torch.equal(self._torch, other._torch):
            return False
        if self._device is None or other._device is None:
            return self._device is other._device
        return torch.equal(self._device, other._device)

    def restore(self) -> None:
        """Sets the recorded generators back."""
        torch.set_rng_state(self._torch)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._device, self._cuda)
        if self._python is not None:
            random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def to_dict(self) -> dict[str, Any]:
        """Torch's generators, for a file."""
        return {"torch": self._torch, "device": self._device}

    @classmethod
    def from_dict(cls, state: dict[str, Any], device: torch.device) -> "RandomState":
        """Reads :meth:`to_dict`; the generator of a device of another kind than the recorded one stays as it is."""
        new = cls(device, others=False)
        new._torch = state["torch"]
        if new._device is not None and state["device"] is not None:
            new._device = state["device"]
        return new


class Sandbox:
    """The stand-ins of a model whose step is run without a trace; made by :func:`sandbox`.

    Attributes:
        parameters: Stand-in of each parameter by its name in ``model.named_parameters()``.
        trained: The names of the parameters that require a gradient.
        is_wide: Whether 16-bit weights and buffers have fp32 stand-ins.
    """

    def __init__(
        self,
        model: nn.Module,
        widen: bool,
        device: torch.device,
        optimizers: Iterable[Optimizer],
        shards: LentShards | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self.is_wide, self._shards = model, widen, shards
        self._refused: list[str] = []
        self._attributes = Attributes(model, self._refuse, beside)
        self._put_context_back = code_names.context()
        _refuse_lazy(self._attributes.modules)
        self._training = _training_flags(self._attributes.modules)
        originals = dict(model.named_parameters())
        self._guard = Guard(self._attributes.modules, self._attributes.leaves, optimizers)
        may_be_sharded = sharding.may_be_sharded()
        sharded = [local_part(each) for each in self._guard.own if may_be_sharded and sharding.is_sharded(each)]
        self._attributes.contents.watch(sharded)
        widened = half_dtypes() if widen else ()
        self._copies = {id(each): _copy(each, widened, may_be_sharded) for each in self._guard.own}
        self.trained = {name for name, param in originals.items() if param.requires_grad}
        self.parameters = {name: self._copies[id(param)] for name, param in originals.items()}

    def of(self, original: Tensor) -> Tensor | None:
        """The stand-in of one of the model's own tensors."""
        return self._copies.get(id(original))

    def open(self, *, as_stored: bool = False) -> None:
        """Puts the stand-ins in place; FSDP2 gathers them as they are stored, or in the run's formats."""
        self._attributes.open(self._copies)
        if self._shards is not None:
            self._shards.open(self._copies, as_stored=as_stored)
        self._guard.open()

    def keep_gradients_of(self, names: Collection[str]) -> None:
        """Lets go of the gradients of all other parameters, each as soon as it is there."""
        for name in self.trained.difference(names):
            self.parameters[name].register_post_accumulate_grad_hook(_let_go)

    def close(self, random: RandomState, error: BaseException | None) -> MixPrecError | None:
        """Puts everything back, each part whatever becomes of the others, and checks it.

        Args:
            random: The random numbers to go on with.
            error: What the step raised.

        Returns:
            The error that says what could not be put back, or what the step did that no replay may do.
        """
        failed: list[BaseException] = []
        shards = () if self._shards is None else (self._shards.put_back,)
        attributes = (*self._attributes.put_back(), *shards)
        last = (self._put_context_back, torch.clear_autocast_cache)
        for step in (*self._guard.put_back(), random.restore, *attributes, *last):
            try:
                step()
            except BaseException as problem:  # a second Ctrl-C, too, waits until all is in its place
                failed.append(problem)
        for interruption in failed:
            if not isinstance(interruption, Exception):
                raise interruption
        written, lost = self._guard.check(self._model, self._pristine, self._attributes.contents.was_written_back)
        others = [] if random.is_same(RandomState(random.device, others=False)) else ["random numbers"]
        others += [] if self._training == _training_flags(self._attributes.modules) else ["training flags"]
        locked = list(self._attributes.contents.locked)
        del self._attributes, self._guard  # which know this: the stand-ins go at once
        if failed or lost or others:
            reason = f"{type(failed[0]).__name__}: {failed[0]}" if failed else f"other {_some(others)}"
            reason = f"it wrote to {_some(lost)}" if lost else reason
            return TraceLeftError(_LOST.format(reason.splitlines()[0]))
        if written:
            return ReplayError(_WRITTEN.format(_some(written)))
        if locked and isinstance(error, ValueError) and "read-only" in str(error):
            return ReplayError(_LOCKED.format(_some(locked)))
        return ReplayError(self._refused[0]) if self._refused else None

    def _refuse(self, name: str) -> ReplayError:
        return self._refuse_because(_REFUSED.format(name))

    def end_wait(self, where: str) -> ReplayError:
        """The error that ends a wait of the step."""
        return self._refuse_because(_WAITED.format(where))

    def _refuse_because(self, message: str) -> ReplayError:
        self._refused.append(message)
        return ReplayError(message)

    def _pristine(self, original: Tensor) -> Tensor | None:
        stand_in = self._copies[id(original)]
        return stand_in if version_of(stand_in) == 0 else None


@contextlib.contextmanager
def sandbox(
    model: nn.Module,
    device: torch.device,
    *,
    widen: bool = False,
    optimizers: Iterable[Optimizer] = (),
    run: object = None,
    as_stored: bool = False,
    is_gathered: bool = False,
) -> Iterator[Sandbox]:
    """Opens a sandbox around a model: whatever is run inside leaves the model and the random numbers as they were.

    Compiled modules run eagerly inside. Takes a copy of the weights and buffers in memory for as long as it is open.
    Weights that are sharded over ranks are not copied, unless they are widened: what the step is about to write to is.
    FSDP2 gathers them as ever, so all ranks have to open it together and run the same inside.

    Args:
        model: The model.
        device: The device it runs on.
        widen: Whether stand-ins of 16-bit weights and buffers are fp32.
        optimizers: The optimizers of the run, whose states are put back or checked as well.
        run: What stands for the run, a Trainer if there is one, whose callbacks and data the step may reach; after the
            first ReplayError none of its steps is run in a sandbox any more.
        as_stored: Whether sharded weights are gathered as they are stored, and not in the run's formats.
        is_gathered: Whether the model is a layer whose sharded weights are whole (:func:`~.lent_shards.gathered`).

    Raises:
        SupportError: The model has lazy parameters that are not initialised yet.
        ReplayError: The step used or wrote to something that no replay may; all is as it was.
        TraceLeftError: Something could not be put back.
    """
    _refuse_if_stopped(run, model, device)
    state = RandomState(device)
    with contextlib.ExitStack() as stack:
        has_shards = not is_gathered and sharding.may_be_sharded() and bool(sharding.leaders_of(model))
        shards = LentShards(model) if has_shards else None
        opened = Sandbox(model, widen, device, optimizers, shards, {name: getattr(run, name, None) for name in _BESIDE})
        stack.enter_context(uncompiled())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            opened.open(as_stored=widen or as_stored)
            with waiting.ended(opened.end_wait):
                yield opened
        except BaseException as error:
            found = opened.close(state, error)
            if found is not None and isinstance(error, Exception):
                raise _remembered(found, run) from error
            raise
        found = opened.close(state, None)
        if found is not None:
            raise _remembered(found, run)


def is_stopped(run: object) -> bool:
    """True for a run of which no step is run in a sandbox any more."""
    return run in _STOPPED


def _remembered(found: MixPrecError, run: object) -> MixPrecError:
    if isinstance(found, ReplayError) and run is not None:
        _STOPPED[run] = str(found)
    return found


def _refuse_if_stopped(run: object, model: nn.Module, device: torch.device) -> None:
    """Raises where a step of the run has left a trace; where weights are sharded on all ranks, which open together."""
    reason = None if run is None else _STOPPED.get(run)
    asks_all = sharding.is_any_sharded(model)
    if ranks.is_any(reason is not None, device) if asks_all else reason is not None:
        raise ReplayError(reason or f"a step left a trace on another rank, and {_NO_FURTHER}")


_STOPPED: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
"""The runs of which a step left a trace in a sandbox, and the error that said so."""

_NO_FURTHER = "no further step of this run is replayed"
_WRITTEN = (
    "the step writes to the weights, buffers or optimizer states of the run themselves ({}), past the copies that a "
    f"replay gives to the model; they were put back, and {_NO_FURTHER}"
)
_REFUSED = (
    "the step uses {}, which cannot be put back after a replay; nothing was taken from it or given to it, and "
    f"{_NO_FURTHER}: use it outside training_step"
)
_WAITED = (
    "the step waits in a replay for what does not come while training stands still ({}); it was ended, and "
    f"{_NO_FURTHER}: wait outside training_step, as in on_train_batch_start"
)
_LOCKED = (
    "the step writes to {}, which is too large to be copied for a replay; nothing was written, and "
    f"{_NO_FURTHER}: make it a tensor, of which only what is written is copied"
)
_LOST = (
    "a replay of the step changed the training, and that could not be put back ({}); resume the run from its last "
    "checkpoint, without the callbacks that replay steps"
)


_BESIDE = ("callbacks", "datamodule", "train_dataloader")
"""What a step may reach through a Trainer and change there."""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _copy(tensor: Tensor, widened: Sequence[torch.dtype], may_be_sharded: bool) -> Tensor:
    if may_be_sharded and sharding.is_sharded(tensor):
        copied = with_local_part(tensor, local_part(tensor.detach()).data)
    else:
        copied = tensor.detach().clone()
    if tensor.dtype in widened:
        copied = copied.float()
    if type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
        vars(copied).update(vars(tensor))
    return copied


def _training_flags(modules: Iterable[nn.Module]) -> list[bool]:
    return [module.training for module in modules]


def _let_go(stand_in: Tensor) -> None:
    stand_in.grad = None


def _refuse_lazy(modules: list[nn.Module]) -> None:
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if type(tensor) is not nn.Parameter and isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                raise SupportError(
                    f"a step cannot be replayed while a {type(module).__name__} has lazy parameters; run the model on "
                    "one batch before training, as its documentation asks"
                )
