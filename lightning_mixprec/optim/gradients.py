"""The gradients of an optimizer, unscaled and checked in place, and the flag that skips its step on the device."""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from lightning_mixprec.numerics.finite import finite_flags
from lightning_mixprec.numerics.flat_batches import local_part, moved_to

_PLAIN = (Tensor, nn.Parameter)
_CHECKED_BY_KERNEL = (torch.float16, torch.float32, torch.float64)  # by torch's one kernel, on every device
_FEW = 1 << 14  # elements that stay in a core's cache


def needs_closure(optimizer: Optimizer) -> bool:
    """True if the optimizer evaluates the loss itself, several times per step (LBFGS)."""
    return _requires_closure(type(optimizer).step)


@functools.cache
def _requires_closure(step: Callable[..., Any]) -> bool:
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def scalar(value: float, device: torch.device) -> Tensor:
    """An fp32 number on a device."""
    return torch.full((), value, dtype=torch.float32, device=device)


def obeys_found_inf(optimizer: Optimizer) -> bool:
    """True if the optimizer's own kernel leaves weights and state alone when told of a non-finite gradient.

    Fused SGD is the exception on its first step: it allocates its momentum and, told to skip, leaves it uninitialised.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    if any(type(param) not in _PLAIN for param in params_of(optimizer)):
        return False  # of DTensors: kernels take no plain tensor, which the flag is, beside them
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    return all(
        "momentum_buffer" in optimizer.state.get(param, {})
        for group in optimizer.param_groups
        if group["momentum"]
        for param in group["params"]
        if param.grad is not None
    )


def tell_found_inf(optimizer: Any, found_inf: Tensor | bool) -> None:
    """Has a fused optimizer's kernel leave everything as it is where the flag is set."""
    if isinstance(found_inf, Tensor):
        optimizer.grad_scale, optimizer.found_inf = None, found_inf


def untell_found_inf(optimizer: Any) -> None:
    """Takes the flag back after the step."""
    vars(optimizer).pop("grad_scale", None)
    vars(optimizer).pop("found_inf", None)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def grads_of(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of those parameters that have one; sparse ones as their values, of DTensors the local part."""
    grads = [grad for param in params if (grad := param.grad) is not None]
    if any(map(attrgetter("is_sparse"), grads)):
        return [_values(param) if grad.is_sparse else grad for param in params if (grad := param.grad) is not None]
    return grads if set(map(type, grads)) <= {Tensor} else [local_part(grad) for grad in grads]


def _values(param: Tensor) -> Tensor:
    """A sparse gradient's values; in fp16 those of one index are added up first, because the sum may overflow."""
    grad = param.grad
    assert grad is not None
    if grad.dtype == torch.float16:
        param.grad = grad = grad.coalesce()
    return grad._values()


def check_and_unscale(grads: list[Tensor], factor: Tensor | None, found_inf: Tensor) -> Tensor:
    """Multiplies gradients in place, if there is a factor; ``found_inf``, or 1 if a gradient is not finite.

    Without a factor gradients are only read, but for small ones on a CPU: torch's kernel for both takes a hundred of
    them in one call, and to write them to the cache again costs less than a call that reads for each.
    """
    for (device, dtype), group in _by_kind(grads).items():
        flag = found_inf if device == found_inf.device else scalar(0.0, device)
        real = [torch.view_as_real(grad) for grad in group] if dtype.is_complex else group
        here = None if factor is None else moved_to(device, factor)
        large, small = _read_only(real) if here is None else ([], real)
        if large:
            flag.copy_(torch.maximum(flag, ~finite_flags(large).all()))
        if small and small[0].dtype in _CHECKED_BY_KERNEL:
            one_or_factor = scalar(1.0, device) if here is None else here
            torch._amp_foreach_non_finite_check_and_unscale_(small, flag, one_or_factor)
        elif nonempty := [grad for grad in small if grad.numel()]:
            flag.copy_(torch.maximum(flag, ~finite_flags(nonempty).all()))
            if here is not None:
                multiply_(nonempty, here)
        if flag is not found_inf:
            found_inf = torch.maximum(found_inf, moved_to(found_inf.device, flag))
    return found_inf


def _read_only(grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of gradients of one kind those that are checked by a pass that only reads, and the others."""
    sizes = list(map(Tensor.numel, grads))
    least = 1 if grads[0].device.type != "cpu" or grads[0].dtype not in _CHECKED_BY_KERNEL else _FEW
    if max(sizes) < least:
        return [], grads
    large = [grad for grad, size in zip(grads, sizes, strict=True) if size >= least]
    return large, [grad for grad, size in zip(grads, sizes, strict=True) if size < least]


def multiply_(tensors: list[Tensor], factor: Tensor | float) -> None:
    """Multiplies tensors of any formats and devices in place, each product rounded once, to the tensor's format."""
    for (device, dtype), group in _by_kind(tensors).items():
        here = moved_to(device, factor) if isinstance(factor, Tensor) else factor
        if isinstance(here, Tensor) and dtype.itemsize == 2:
            # CUDA rounds a number on the device to the tensors' format first: in fp16 a scale of 65536 is infinite.
            torch._foreach_mul_(group, [here.view([1] * tensor.dim()) for tensor in group])
        else:
            torch._foreach_mul_(group, here)


def _by_kind(tensors: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    if not tensors:
        return {}
    grouped = _group_tensors_by_device_and_dtype([list(tensors)])
    return {kind: cast(list[Tensor], group) for kind, ((group,), _) in grouped.items()}


class GradMark:
    """Tells a gradient from a later one, and from itself with more added."""

    def __init__(self, grad: Tensor | None) -> None:
        self._grad = None if grad is None else weakref.ref(grad)
        self._version = None if grad is None else grad._version

    def fits(self, grad: Tensor | None) -> bool:
        """True if this is still the gradient it was."""
        return self._grad is not None and grad is not None and self._grad() is grad and self._version == grad._version


def spent_params(stepped: Iterable[Optimizer], marks: Mapping[int, GradMark]) -> set[int]:
    """Parameters, by ``id``, whose gradients were stepped on and are no others since.

    Args:
        stepped: Optimizers that took their step.
        marks: By the parameter's ``id``, what its gradient was before a later backward; none if there was none.
    """
    params = (param for optimizer in stepped for param in params_of(optimizer))
    return {id(param) for param in params if id(param) not in marks or marks[id(param)].fits(param.grad)}
