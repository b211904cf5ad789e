"""Torch's optimizers on weights in 16 bits: options of each group, steps by chunks, a state that keeps its bits."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable
from typing_extensions import override

from lightning_mixprec.errors import SupportError
from lightning_mixprec.optim.gradients import params_of
from lightning_mixprec.optim.kept_moments import STATES
from lightning_mixprec.optim.kept_weights import WEIGHTS
from lightning_mixprec.optim.loaded_states import as_configured, store_weight
from lightning_mixprec.optim.narrow_steps import (
    Moment,
    Widened,
    chunks,
    empty_kept,
    empty_moment,
    is_kept,
    is_narrow,
    is_plain,
)
from lightning_mixprec.optim.numbered import drawn

OPTIONS = ("weights", "states", "seed", "grad_dtype")
"""The options of a group that torch's optimizers do not have."""


class LowPrecisionOptimizer(Optimizer):
    """A base for optimizers whose weights and moments may be stored in fewer bits than they are computed in.

    Before torch's class in the order of bases; that one's ``_init_group`` and its function do the steps.
    """

    _MOMENTS: ClassVar[tuple[Moment, ...]]

    def _set_options(self, weights: str, states: str, seed: int, grad_dtype: torch.dtype | None) -> None:
        """The options of groups that say nothing; before torch's constructor."""
        self._options = dict(zip(OPTIONS, (weights, states, seed, grad_dtype), strict=True))

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, which may have options of its own."""
        for name, value in self._options.items():
            param_group.setdefault(name, value)
        _check_options(param_group)
        super().add_param_group(param_group)
        self.defaults.update(self._options)
        _accumulate_in(self.param_groups[-1])

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._options.items():
                group.setdefault(name, value)

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
            for chunk in chunks(narrow, group["states"]):
                self._narrow_step(group, chunk, places)
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

    def _narrow_step(self, group: dict[str, Any], params: list[Tensor], places: Mapping[Tensor, int]) -> None:
        moments, is_first = self._moments_of(group), []
        for param in params:
            _check_grad(param, group)
            state = self._state_of(param, group)
            missing = [moment for moment in moments if not isinstance(state.get(moment.name), Tensor)]
            is_first.append(bool(missing))
            for moment in missing:
                state |= empty_moment(param, moment, group["states"])
        wide = Widened(params, [self.state[param] for param in params], group, moments)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        self._wide_step(group, wide, is_first, found_inf)
        noise = None
        if wide.needs_noise:
            noise = drawn(params, [places[param] for param in params], wide.steps, group["seed"])
        wide.store(noise, found_inf)

    def _state_of(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter that is not stored as torch has it, with all but its moments."""
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            on_device = group.get("capturable") or group.get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
        if is_narrow(param) and not is_kept(state, param, group["weights"]):
            state |= empty_kept(param, group["weights"])
        return state

    def set_weight(self, param: Tensor, wide: Tensor) -> None:
        """Gives a weight in 16 bits an fp32 value; the bits that it cannot hold are kept in the state.

        Args:
            param: A parameter of this optimizer, in 16 bits.
            wide: The value; of a DTensor the part of this rank.
        """
        group = next(group for group in self.param_groups if any(param is each for each in group["params"]))
        store_weight(param, self._state_of(param, group), wide, group["weights"])

    @override
    @torch.compiler.disable
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, of this optimizer or of torch's, whatever it was stored in.

        How weights and moments are stored stays as it is configured; what the state has is stored so, without a loss
        where there is room. Where weights are stored in fp32 now, and the state has the bits that weights in 16 bits had
        lost, they are given to the weights; so load the model's weights first.
        """
        own = [{name: group[name] for name in ("weights", "states", "grad_dtype")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        saved = state_dict["state"]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        groups = [group for group in self.param_groups for _ in group["params"]]
        for key, param, group in zip(keys, params_of(self), groups, strict=True):
            if key in saved:
                as_configured(param, self.state[param], saved[key], group, self._moments_of(group))


def _check_options(group: Mapping[str, Any]) -> None:
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
            "a weight in 16 bits, or with moments in 16 or 8, has a sparse gradient, which only torch's own storage takes; "
            "store both in fp32 (states='fp32'), or use Embedding(sparse=False)"
        )
    if group.get("differentiable"):
        raise SupportError("differentiable=True needs weights and moments in fp32; leave one of them out")
