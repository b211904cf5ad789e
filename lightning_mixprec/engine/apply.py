"""Attach, change and detach an assignment on a live model."""

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_mixprec.engine import fastpath, sharding
from lightning_mixprec.engine.backends import Backends, Emulate, check_emulate
from lightning_mixprec.engine.backends.replacing import Replacing
from lightning_mixprec.engine.border_plan import Plan, Site, bypassing, draw, survey
from lightning_mixprec.engine.borders import Border, border_of
from lightning_mixprec.engine.compiling import CompilerSettings
from lightning_mixprec.engine.first_step import FirstStepCheck
from lightning_mixprec.engine.weights import Gate, Storage, reflatten
from lightning_mixprec.errors import PolicyError, SupportError
from lightning_mixprec.numerics.formats import REFERENCE, Format, format_of, get_format, half_dtypes, is_wider
from lightning_mixprec.policy.assignment import Assignment, LayerPrecision
from lightning_mixprec.policy.module_names import unwrap, walk

_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def attach(
    model: nn.Module, assignment: Mapping[str, Any], device_type: str, emulate: Emulate = "auto"
) -> "Attachment":
    """Makes a model obey an assignment until it is detached.

    Weights are stored as their rules say, and every module whose format differs from its surroundings gets a border.
    A uniform assignment that matches what is stored changes nothing below the root.

    Args:
        model: the model; wrappers around it and inside it are looked through.
        assignment: by the name of each module a ``LayerPrecision``, or anything else with ``param``, ``compute`` and
            ``output``: the formats that its weights are stored in, that it computes in, and that its output is handed
            on in (``"input"`` for the one that came, None for as computed).
        device_type: the device type whose autocast computes in 16 bits: ``"cuda"`` or ``"cpu"``.
        emulate: ``"auto"``: 16-bit formats are emulated that the device has no arithmetic for, where it is present;
            True: also those that it has; False: torch's own kernels compute.

    Raises:
        PolicyError: the model is attached already, a part of it cannot be given its format, or the assignment is
            that of another model.
        SupportError: there is no such device type, or no such word for ``emulate``.

    >>> wide, low = LayerPrecision(param="fp32", compute="fp32"), LayerPrecision(param="fp32", compute="bf16")
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> attachment = attach(model, {"": low, "0": low, "1": wide}, "cpu")
    >>> with attachment.context():
    ...     model[0](torch.ones(1, 2)).dtype, model[1](torch.ones(1, 2)).dtype
    (torch.bfloat16, torch.float32)
    >>> attachment.detach()
    """
    _check_arguments(model, assignment, device_type, emulate)
    root = unwrap(model)
    if root in _attached:
        raise PolicyError(
            f"this {type(root).__name__} has per-layer formats attached already; detach them first, or change them "
            "with Attachment.change"
        )
    for node in walk(root):
        _strip(node.module)
    attachment = Attachment(model, Backends(device_type, emulate))
    try:
        attachment._store(_layers_of(assignment))
        attachment.change(assignment)
    except BaseException:
        attachment.detach()
        raise
    return attachment


class Attachment:
    """An assignment in force on a model; made by :func:`attach`. Keeps the model alive until it is detached."""

    def __init__(self, model: nn.Module, backends: Backends) -> None:
        self._model: nn.Module | None = model
        self._backends = backends
        self._sites = survey(model)
        self._groups = sharding.groups_of(self._sites)
        self._gate = Gate()
        self._weights, self._buffers = Storage(), Storage()
        self._fast_paths = fastpath.FastPaths()
        self._borders: dict[Site, Border] = {}
        self._layers: Mapping[str, LayerPrecision] = {}
        self._plan = Plan({}, {}, False)
        self._root = backends.region(REFERENCE)
        self._modes: list[Replacing] = []
        self._settings = CompilerSettings()
        self._check: FirstStepCheck | None = None
        _attached.add(unwrap(model))

    def change(self, assignment: Mapping[str, Any], *, is_lent: bool = False) -> None:
        """Puts another assignment in force, between steps. What is stored in which format stays as it is.

        A compiled model is compiled once more for an assignment that it has not had yet, and found again for others.

        Args:
            assignment: what each module is assigned, as for :func:`attach`.
            is_lent: whether nothing is compiled or gathered under it, because a sandbox tries it or compares with it.

        Raises:
            PolicyError: a part of the model cannot be given its format; the old assignment is still in force.
        """
        if self._model is None:
            raise PolicyError("the formats of a model were to change after they were detached; attach them again")
        layers = _layers_of(assignment)
        plan = draw(self._sites, layers, self._backends)
        if self._widen_buffers(layers):
            plan = draw(self._sites, layers, self._backends)
        plan = sharding.gathered_first(plan, self._model)
        if not is_lent:
            sharding.gather(self._groups, layers)
        for site in self._plan.crossings.keys() - plan.crossings.keys():
            self._borders[site].remove()
        for site, crossing in plan.crossings.items():
            if site not in self._borders:
                self._borders[site] = Border(site.module, self._backends, self._gate)
            self._borders[site].become(crossing)
            self._borders[site].install()
        self._fast_paths.keep_off(bypassing(self._sites, plan))
        self._plan, self._layers = plan, layers
        root = self._sites[0]
        self._root = self._backends.region(plan.formats[root], plan.narrow.get(root))
        modes = {self._backends.region(format).mode for format in set(plan.formats.values())}
        self._modes = [mode for mode in modes if mode is not None]
        if not is_lent:
            self._settings.make_room(self._model, self._sites, plan)

    @property
    def is_sharded(self) -> bool:
        """True if weights are gathered for each use (FSDP2)."""
        return bool(self._groups)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The format of the root's own operations, to be entered around each step; it may be entered again inside."""
        return self._root.context()

    def backward_context(self) -> contextlib.AbstractContextManager[Any]:
        """To be entered around backward: what checkpointing computes anew there, it computes as in forward.

        Autocast is left to checkpointing, and what replaces functions of torch is entered.
        """
        if not self._modes:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        for mode in self._modes:
            if not mode.is_entered():
                stack.enter_context(mode)
        return stack

    def begin_first_step(self) -> None:
        """Begins the first-step check."""
        if self._check is None and self._model is not None:
            borders = {site: self._borders[site] for site in self._plan.crossings}
            self._check = FirstStepCheck(self._model, self._sites, self._plan, borders)

    def end_first_step(self) -> None:
        """Ends the first-step check.

        Raises:
            PolicyError: a border was walked around: its module's forward never ran, but a module inside did.
        """
        check, self._check = self._check, None
        if check is not None:
            check.end(self._layers)

    def restore_precise(self, checkpoint_state: Mapping[str, Any]) -> None:
        """Restores the bits of weights that were loaded from a checkpoint before they were stored more widely here.

        Args:
            checkpoint_state: the checkpoint's tensors by the names of the model's own state_dict; others are ignored.
        """
        if self._model is not None:
            named = dict(self._model.named_parameters(remove_duplicate=False))
            self._weights.restore_precise(named, checkpoint_state)
            buffers = dict(self._model.named_buffers(remove_duplicate=False))
            self._buffers.restore_precise(buffers, checkpoint_state)

    def lossy_weights(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weights that are stored in fewer bits than before, and what they were; those that change are to be taken."""
        return self._weights.lossy()

    def narrowed_weights(self) -> list[torch.Tensor]:
        """Weights that are stored in 16 bits because a rule says so."""
        return self._weights.narrowed()

    def lost_of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What a weight is to be with all its bits, if they are kept here."""
        return self._weights.wide_of(weight)

    def take(self, weight: torch.Tensor) -> None:
        """Leaves it to the caller to keep the bits that a weight has lost; others come back when it is detached."""
        self._weights.forget_wide(weight)

    def keep(self, weight: torch.Tensor, wide: torch.Tensor) -> None:
        """Keeps what a weight is to be when it is detached, as far as it has not changed until then."""
        self._weights.keep_wide(weight, wide)

    def detach(self) -> None:
        """Leaves the model as it was: forwards, hooks, stored formats. Doing it again does nothing.

        Weights that were stored in fewer bits get back those that they lost, unless they have changed since.
        """
        if self._model is None:
            return
        self._settings.end()
        with contextlib.suppress(PolicyError):
            self.end_first_step()
        for site in self._plan.crossings:
            self._borders[site].remove()
        self._fast_paths.keep_off(())
        self._buffers.keep_only(())
        if self._weights.keep_only(()):
            reflatten(self._model.modules())
            sharding.take_stored(self._groups)
        if self._groups:
            sharding.release(self._groups)
            sharding.reshard(self._model)
        _attached.discard(unwrap(self._model))
        self._model, self._sites, self._groups, self._borders = None, [], [], {}
        self._plan = self._plan._replace(crossings={}, formats={})

    def _store(self, layers: Mapping[str, LayerPrecision]) -> None:
        assert self._model is not None
        # All are asked before any is converted: a tied weight is stored as one of its modules says.
        asked = [(module, _asked_param(module, layers[name])) for name, module, _ in walk(self._model)]
        _refuse_sharded(asked)
        sharding.check_stored(self._groups, {id(module): dtype for module, dtype in asked})
        converted = [
            module
            for module, dtype in asked
            if dtype is not None and self._weights.convert(_own(module._parameters), dtype)
        ]
        reflatten(converted)
        if converted:
            sharding.take_stored(self._groups)

    def _widen_buffers(self, layers: Mapping[str, LayerPrecision]) -> bool:
        """Stores the buffers of fp64 layers in fp64, so that what they accumulate keeps its bits from step to step."""
        wide = [
            buffer
            for site in self._sites
            if is_wider((layer := layers[site.name]).compute, REFERENCE) and not layer.stays_wide
            for part in site.parts
            for buffer in _own(part._buffers)
        ]
        converted = self._buffers.convert(wide, torch.float64)
        return self._buffers.keep_only(wide) or converted


def _check_arguments(model: object, assignment: object, device_type: object, emulate: object) -> None:
    if not isinstance(model, nn.Module) or not isinstance(assignment, Mapping):
        raise PolicyError(
            f"attach was given a {type(model).__name__} and a {type(assignment).__name__}; give a module and its "
            "assignment, which policy.resolve(module) makes"
        )
    names = [name for name, _, _ in walk(unwrap(model))]
    if left := [*(name for name in names if name not in assignment), *(assignment.keys() - set(names))]:
        kind = type(unwrap(model)).__name__
        raise PolicyError(
            f"the assignment is not of this {kind}: {left[0]!r} is in one of them alone; give policy.resolve(module)"
        )
    if device_type not in ("cpu", "cuda"):
        raise SupportError(f"device_type is {device_type!r}; it must be 'cpu' or 'cuda'")
    check_emulate(emulate)


def _own(tensors: Mapping[str, Any]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors.values() if tensor is not None]


def _layers_of(assignment: Mapping[str, Any]) -> dict[str, LayerPrecision]:
    """The formats of each layer; an assignment knows for which layers a rule's ``output`` is meant."""
    if isinstance(assignment, Assignment):
        return {
            name: layer if layer.output == (output := assignment.hands_on(name)) else replace(layer, output=output)
            for name, layer in assignment.items()
        }
    return {
        name: layer if isinstance(layer, LayerPrecision) else LayerPrecision(layer.param, layer.compute, layer.output)
        for name, layer in assignment.items()
    }


def _asked_param(module: nn.Module, layer: LayerPrecision) -> torch.dtype | None:
    """The dtype a module's own weights are to be stored in, ``None`` if nobody asked for one."""
    if layer.rule is None:
        stored = next((p.dtype for p in _own(module._parameters) if p.is_floating_point()), None)
        asked = layer.param if stored is not None and format_of(stored) != layer.param else None
    else:
        asked = layer.rule.param
    format = None if asked is None else get_format(asked)
    return format.dtype if isinstance(format, Format) else None


def _refuse_sharded(asked: Iterable[tuple[nn.Module, torch.dtype | None]]) -> None:
    for module, dtype in asked:
        for param in _own(module._parameters) if dtype is not None else ():
            if sharding.is_sharded(param) and param.dtype != dtype and dtype not in half_dtypes():
                raise PolicyError(
                    f"a {type(module).__name__} is to store its weights in {dtype}, but they are sharded in "
                    f"{param.dtype}; store them so before fully_shard (module.to), and leave param out of the policy"
                )


def _strip(module: nn.Module) -> None:
    """Takes off what a deep copy of an attached model has inherited."""
    if (border := border_of(module)) is not None:
        border.remove()
    fastpath.strip(module)
