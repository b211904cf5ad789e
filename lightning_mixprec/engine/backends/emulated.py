"""Emulation: a 16-bit format on a device without arithmetic of its own, by products in fp32 of operands in 16 bits.

Autocast stays on, so that every operation has the dtype that it has on other devices; products and convolutions alone,
which torch would compute in a reference kernel there, are replaced.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, get_autocast_dtype, is_autocast_enabled

from lightning_mixprec.engine.backends import products
from lightning_mixprec.engine.backends.autocast import AutocastRegion
from lightning_mixprec.engine.backends.functions import BACKWARD, COMPOSITES, NOT_CAST, PRODUCTS
from lightning_mixprec.engine.backends.protocol import Region
from lightning_mixprec.engine.backends.replacing import Function, Replacing
from lightning_mixprec.numerics.devices import Support, native_support
from lightning_mixprec.numerics.devices.timing import time_ratio
from lightning_mixprec.numerics.formats import get_format

_SIZE = 256
"""Rows and columns of the product that is timed."""

_ELSEWHERE = ("out", "out_dtype")
"""Arguments of calls that are torch's own all the same, and that autocast leaves alone, too."""


class Emulation(Replacing):
    """Products of 16-bit operands computed in fp32 within, in whatever format the part of the model computes.

    Args:
        device: The device type.
        dtypes: The 16-bit dtypes that it has no arithmetic for.
    """

    def __init__(self, device: str, dtypes: tuple[torch.dtype, ...]) -> None:
        ways = ((self._product, PRODUCTS), (self._composite, COMPOSITES), (self._backward, BACKWARD))
        super().__init__({f: functools.partial(way, own) for way, table in ways for f, own in table.items()})
        self.device, self.dtypes = device, dtypes

    def _product(
        self, own: Callable[..., Any], function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A product if its operands, cast as autocast would here, are all of one emulated dtype; else torch's own."""
        if not _goes_elsewhere(kwargs):
            cast = self._cast if self._casts(function) else _itself
            narrow_kwargs = {name: _mapped(cast, arg) for name, arg in kwargs.items()}
            narrow_args = [_mapped(cast, arg) for arg in reversed(args)][::-1]  # autocast begins with the last, too
            if self._is_emulated([*narrow_args, *narrow_kwargs.values()]):
                result = own(*narrow_args, **narrow_kwargs)
                if result is not NotImplemented:
                    return result
        return function(*args, **kwargs)

    def _composite(
        self, own: Callable[..., Any], function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What is made of products, if some of them may be emulated; else torch's own."""
        is_cast = is_autocast_enabled(self.device) and get_autocast_dtype(self.device) in self.dtypes
        given = [tensor for arg in (*args, *kwargs.values()) for tensor in _tensors(arg)]
        tensors = [tensor for tensor in given if tensor.is_floating_point()]
        is_emulated = is_cast or any(tensor.dtype in self.dtypes for tensor in tensors)
        if is_emulated and self._is_here(tensors) and not _goes_elsewhere(kwargs):
            with self:
                result = own(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(*args, **kwargs)

    def _backward(
        self, own: Callable[..., Any], function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self:
            return own(*args, **kwargs)

    def _casts(self, function: Function) -> bool:
        return is_autocast_enabled(self.device) and function not in NOT_CAST[self.device]

    def _cast(self, tensor: Tensor) -> Tensor:
        """A tensor as autocast casts the operands of products: fp64 stays."""
        is_eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == self.device
        return tensor.to(get_autocast_dtype(self.device)) if is_eligible else tensor

    def _is_emulated(self, operands: list[Any]) -> bool:
        """True if there are tensors, here, and all but masks of one of the dtypes."""
        given = [tensor for operand in operands for tensor in _tensors(operand)]
        tensors = [tensor for tensor in given if tensor.dtype != torch.bool]
        return (
            len({tensor.dtype for tensor in tensors}) == 1
            and tensors[0].dtype in self.dtypes
            and self._is_here(tensors)
        )

    def _is_here(self, tensors: list[Tensor]) -> bool:
        """True of tensors on the device; nested and sparse ones are left to torch."""
        return all(
            tensor.device.type == self.device and not tensor.is_nested and tensor.layout == torch.strided
            for tensor in tensors
        )

    def __reduce__(self) -> Any:
        """A copy is the same: whether it is entered is a matter of the thread."""
        return emulation, (self.device, self.dtypes)


@functools.cache
def emulation(device: str, dtypes: tuple[torch.dtype, ...]) -> Emulation:
    """The mode that emulates some dtypes on a type of device, always the same one."""
    return Emulation(device, dtypes)


class Emulated:
    """The backend of 16-bit formats on a device that has no arithmetic for them, or is to use none.

    Args:
        device: The device type.
        formats: The formats that are emulated on it.

    >>> Emulated("cpu", ["bf16"]).computes("bf16"), Emulated("cpu", ["bf16"]).computes("fp16")
    (True, False)
    """

    def __init__(self, device: str, formats: Iterable[str]) -> None:
        self.formats = tuple(formats)
        self.mode = emulation(device, tuple(get_format(format).forward.dtype for format in self.formats))

    def computes(self, format: str) -> bool:
        """True of the formats that are emulated."""
        return format in self.formats

    def support(self, format: str, device: torch.device) -> Support:
        """The device's own arithmetic, which is not used here."""
        return native_support(format, device)

    def cost(self, format: str, device: torch.device) -> float:
        """The time of a product as a multiple of its time in fp32, measured once per process."""
        return factor_against_fp32(format, str(device))

    def region(self, format: str, device_type: str) -> "EmulatedRegion":
        """Autocast to the format's dtype, with products replaced."""
        return EmulatedRegion(AutocastRegion(device_type, get_format(format).forward.dtype, True), self.mode)


class EmulatedRegion:
    """The state of a part of a model in which autocast casts and products are replaced.

    Args:
        surrounding: Autocast's state.
        mode: What replaces products.
    """

    def __init__(self, surrounding: Region, mode: Replacing) -> None:
        self.surrounding, self.mode, self.dtype = surrounding, mode, surrounding.dtype

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Both for everything within; the mode is entered once, however often it is asked for."""
        with self.surrounding.context():
            if self.mode.is_entered():
                yield
            else:
                with self.mode:
                    yield

    def call(
        self,
        was_on: bool,
        was: torch.dtype,
        compute: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call with both."""
        if self.mode.is_entered():
            return self.surrounding.call(was_on, was, compute, args, kwargs)
        with self.mode:
            return self.surrounding.call(was_on, was, compute, args, kwargs)


def _goes_elsewhere(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in _ELSEWHERE)


def _mapped(cast: Callable[[Tensor], Tensor], arg: Any) -> Any:
    """An argument with its tensors cast, as far as torch's own functions take tensors in lists."""
    if isinstance(arg, Tensor):
        return cast(arg)
    if isinstance(arg, (list, tuple)):
        return type(arg)(_mapped(cast, part) for part in arg)
    return arg


def _tensors(arg: Any) -> list[Tensor]:
    if isinstance(arg, Tensor):
        return [arg]
    return [tensor for part in arg for tensor in _tensors(part)] if isinstance(arg, (list, tuple)) else []


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@functools.cache
def factor_against_fp32(format: str, device: str) -> float:
    """The time of an emulated product as a multiple of the same product in fp32, once per process: some milliseconds.

    Args:
        format: A 16-bit format.
        device: A device that is present.
    """
    a, b = (torch.ones(_SIZE, _SIZE, device=device) for _ in range(2))
    narrow = [tensor.to(get_format(format).forward.dtype) for tensor in (a, b)]
    return time_ratio(functools.partial(products.mm, *narrow), functools.partial(torch.mm, a, b), a.device)
