"""Torch's optimizers on weights in 16 bits: options of each group, steps by chunks, a state that keeps its bits."""

import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable
from typing_extensions import override

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.flat_batches import local_part, moved_to
from lightning_mixprec.optim.checkpoint_files import WEIGHT_NAMES
from lightning_mixprec.optim.gradients import params_of
from lightning_mixprec.optim.kept_moments import STATES, Moment, empty_moment, is_plain
from lightning_mixprec.optim.kept_weights import KEPT, WEIGHTS, empty_kept, is_kept, is_narrow, keeping_in
from lightning_mixprec.optim.loaded_states import as_configured, give_bits, store_weight
from lightning_mixprec.optim.narrow_steps import Widened
from lightning_mixprec.optim.numbered import drawn
from lightning_mixprec.optim.pieces import Part, chunks

STORAGE = ("weights", "states", "grad_dtype")
"""The options of a group that say how it is stored, which stay as they are when a state is loaded."""

_NUMBERS = {"lr", "eps", "weight_decay", "momentum", "dampening"}
"""Torch's options of a group that are one number."""


class LowPrecisionOptimizer(Optimizer):
    """A base for optimizers whose weights and moments may be stored in fewer bits than they are computed in.

    Before torch's class in the order of bases; that one's ``_init_group`` and its function do the steps.
    """

    _MOMENTS: ClassVar[tuple[Moment, ...]]
    _COUNTS_ALWAYS: ClassVar = True
    """Whether torch's class counts its steps, too."""
    _names: Mapping[Tensor, str] = MappingProxyType({})

    def _set_options(
        self, weights: str, states: str, seed: int, grad_dtype: torch.dtype | None, **plain: object
    ) -> None:
        """The options of groups that say nothing; before torch's constructor, which knows none of them.

        Args:
            weights: See the optimizers; so are ``states``, ``seed`` and ``grad_dtype``.
            states: As above.
            seed: As above.
            grad_dtype: As above.
            plain: Torch's own, which compares them before it looks whether they are numbers.
        """
        _check_numbers(plain)
        self._options = {"weights": weights, "states": states, "seed": seed, "grad_dtype": grad_dtype}

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, which may have options of its own."""
        self.defaults.update(vars(self).pop("_options", {}))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
        except SupportError:
            self.param_groups.pop()
            raise
        _accumulate_in(group)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in (*STORAGE, "seed"):
                group.setdefault(name, self.defaults[name])

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step.

        Args:
            closure: Evaluates the model again and returns the loss.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = {param: place for place, param in enumerate(params_of(self))}
        for group in self.param_groups:
            with_grad = [param for param in group["params"] if param.grad is not None]
            plain = [param for param in with_grad if is_plain(param, group["states"])]
            if plain:
                self._plain_step({**group, "params": plain})
            narrow = [param for param in with_grad if not is_plain(param, group["states"])]
            if narrow:
                self._narrow_steps(group, narrow, places)
        return loss

    def _plain_step(self, group: dict[str, Any]) -> None:
        """Torch's own step of parameters that are stored as torch has them."""
        raise NotImplementedError

    def _wide_step(self, group: dict[str, Any], wide: Widened, is_first: list[bool], found_inf: Tensor | None) -> None:
        """Torch's own step of what a chunk was widened to; for some of it the first one."""
        raise NotImplementedError

    def _moments_of(self, group: Mapping[str, Any]) -> list[Moment]:
        """The moments that the parameters of a group have."""
        raise NotImplementedError

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _narrow_steps(self, group: dict[str, Any], params: Sequence[Tensor], places: Mapping[Tensor, int]) -> None:
        """The step of parameters that are not stored as torch has them; compiled (torch 2.14) it corrupts memory."""
        moments = self._moments_of(group)
        is_first = {param: self._prepare(param, group, moments) for param in params}
        for chunk in chunks(params, group["states"]):
            self._narrow_step(group, chunk, moments, is_first, [places[part.param] for part in chunk])

    def _narrow_step(
        self,
        group: dict[str, Any],
        chunk: Sequence[Part],
        moments: Sequence[Moment],
        is_first: Mapping[Tensor, bool],
        places: Sequence[int],
    ) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            found_inf = moved_to(local_part(chunk[0].param).device, found_inf)
        wide = Widened(chunk, [self.state[part.param] for part in chunk], group, moments)
        self._wide_step(group, wide, [is_first[part.param] for part in chunk], found_inf)
        noise = drawn(chunk, places, wide.steps, group["seed"]) if wide.needs_noise else None
        wide.store(noise, found_inf)

    def _prepare(self, param: Tensor, group: Mapping[str, Any], moments: Sequence[Moment]) -> bool:
        """Gives a parameter that is not stored as torch has it what its step needs; True if it is the first one."""
        _check_grad(param, group)
        state = self._state_of(param, group)
        missing = [moment for moment in moments if not isinstance(state.get(moment.name), Tensor)]
        for moment in missing:
            state.update(empty_moment(param, moment, group["states"]))
        return bool(missing)

    def _state_of(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter that is not stored as torch has it, with all but its moments."""
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            on_device = group.get("capturable") or group.get("fused")
            device = local_part(param).device if on_device else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        if is_narrow(param) and not is_kept(state, param, group["weights"]):
            state.update(empty_kept(param, group["weights"]))
        return state

    def complete_states(self) -> None:
        """Gives every parameter the state that its first step begins with, as distributed checkpoints need it to load.

        Torch does so by a step without gradients, but not where an optimizer has any state, as bits of weights are.
        """
        for group in self.param_groups:
            for param in group["params"] if self._begins_at_zero(group) else ():
                if not param.requires_grad:
                    continue
                counts = self._COUNTS_ALWAYS or not is_plain(param, group["states"])
                state = self._state_of(param, group) if counts else self.state[param]
                for moment in self._moments_of(group):
                    if moment.name not in state:
                        state.update(empty_moment(param, moment, group["states"]))

    def _begins_at_zero(self, group: Mapping[str, Any]) -> bool:
        """True if a first step with moments of 0 is the first step."""
        return True

    def set_weight(self, param: Tensor, wide: Tensor) -> None:
        """Gives a weight in 16 bits an fp32 value; the bits that it cannot hold are kept in the state.

        Args:
            param: A parameter of this optimizer, in 16 bits.
            wide: The value; of a DTensor the part of this rank.
        """
        group = next(group for group in self.param_groups if any(param is each for each in group["params"]))
        store_weight(param, self._state_of(param, group), wide, group["weights"])

    def name_weights(self, names: Mapping[Tensor, str]) -> None:
        """Has the state_dict say which weights are whose, for :func:`~lightning_mixprec.optim.full_weights`."""
        self._names = dict(names)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it, and beside it the names of the weights if they are known."""
        state = super().state_dict()
        if names := [name for param in params_of(self) if (name := self._names.get(param)) is not None]:
            state[WEIGHT_NAMES] = names
        return state

    def give_back(self) -> None:
        """Gives weights that have become fp32 the bits that are kept of them, and keeps them no longer."""
        for param, state in self.state.items():
            if not is_narrow(param):
                give_bits(param, state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, of this optimizer or of torch's, whatever it was stored in.

        How weights and moments are stored stays as it is configured; what the state has is stored so, without a loss
        where there is room, and otherwise with one warning. Where weights are stored in fp32 now, and the state has the
        bits that weights in 16 bits had lost, the weights get them; so load the model's weights first. Where it has
        none, those that :meth:`set_weight` gave before the first step are kept.
        """
        given = {param: dict(state) for param, state in self.state.items() if _has_not_stepped(state)}
        configured = [{name: group[name] for name in (*STORAGE, "seed")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        saved_groups = state_dict["param_groups"]
        for group, saved_group, own in zip(self.param_groups, saved_groups, configured, strict=True):
            group.update(own, seed=saved_group.get("seed", own["seed"]))
        saved = state_dict["state"]
        keys = [key for group in saved_groups for key in group["params"]]
        groups = [group for group in self.param_groups for _ in group["params"]]
        lost: dict[str, None] = {}
        for key, param, group in zip(keys, params_of(self), groups, strict=True):
            if key in saved:
                moments = self._moments_of(group)
                lost |= dict.fromkeys(as_configured(param, self.state[param], saved[key], group, moments))
            if param in given and keeping_in(saved.get(key, {})) is None:
                self.state[param].update({name: given[param][name] for name in KEPT & given[param].keys()})
        if lost:
            warnings.warn(
                f"the loaded state of the optimizer has more bits than are kept here: {'; '.join(lost)}. To keep them, "
                "load it where weights='exact' and states are stored as they were",
                stacklevel=2,
            )


def _has_not_stepped(state: Mapping[str, Any]) -> bool:
    return isinstance(state.get("step"), Tensor) and float(state["step"]) == 0


def _check_numbers(options: Mapping[str, Any]) -> None:
    for name in sorted(_NUMBERS & options.keys()):
        if not isinstance(options[name], (numbers.Real, Tensor)):
            raise SupportError(f"{name} is {options[name]!r} ({type(options[name]).__name__}); it must be a number")
    betas = options.get("betas", (0.0, 0.0))
    is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not is_pair or not all(isinstance(each, (numbers.Real, Tensor)) for each in betas):
        raise SupportError(f"betas is {betas!r}; it must be two numbers, as in (0.9, 0.999)")


def _check_options(group: Mapping[str, Any]) -> None:
    _check_numbers(group)
    for name, allowed in (("weights", WEIGHTS), ("states", STATES)):
        if group[name] not in allowed:
            raise SupportError(f"{name} is {group[name]!r}; allowed are {', '.join(map(repr, allowed))}")
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
        raise SupportError(f"seed is {group['seed']!r}; it must be a whole number")
    if group["grad_dtype"] not in (None, torch.float32):
        raise SupportError(
            f"grad_dtype is {group['grad_dtype']!r}; give torch.float32, in which gradients of 16-bit weights then "
            "accumulate, or None for the weight's own format"
        )
    if group["states"] == "int8" and any(local_part(param) is not param for param in group["params"]):
        raise SupportError(
            "states is 'int8', and a parameter is a DTensor, whose shards would cut the blocks that share a scale; use "
            "states='bf16' where weights are sharded"
        )


def _accumulate_in(group: Mapping[str, Any]) -> None:
    """Has the gradients of weights in 16 bits accumulate in what the group says."""
    dtype = group["grad_dtype"]
    for param in group["params"] if dtype is not None else ():
        if is_narrow(param):
            if not hasattr(param, "grad_dtype"):
                raise SupportError(f"torch {torch.__version__} has no grad_dtype; leave it out or take a newer torch")
            param.grad_dtype = dtype


def _check_grad(param: Tensor, group: Mapping[str, Any]) -> None:
    assert param.grad is not None
    if param.grad.is_sparse:
        raise SupportError(
            "a weight in 16 bits, or with moments in 16 or 8, has a sparse gradient, which only torch's own storage "
            "takes; store both in fp32 (states='fp32'), or use Embedding(sparse=False)"
        )
    if group.get("differentiable"):
        raise SupportError("differentiable=True needs weights and moments in fp32; leave one of them out")
