"""What fp8 and int8 have in common: products of linear layers in 8 bits, in a region that computes in 16."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import _pop_mode_temporarily

from lightning_mixprec.engine.backends.emulated import EmulatedRegion
from lightning_mixprec.engine.backends.protocol import Region
from lightning_mixprec.engine.backends.scaled_linear import NarrowLinear, Products, narrow_linear
from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.devices import Support, native_support
from lightning_mixprec.numerics.formats import get_format


class Narrow:
    """A backend whose format products alone compute in.

    Args:
        format: The format.
        device: The device type.
        emulate: ``"auto"``: the products are emulated where the device has none, if it is present; True: everywhere;
            False: nowhere.

    >>> Narrow("fp8", "cpu", "auto").computes("fp8"), Narrow("fp8", "cpu", "auto").computes("bf16")
    (True, False)
    """

    def __init__(self, format: str, device: str, emulate: bool | str) -> None:
        self.format, self.device, self.emulate = format, device, emulate

    def computes(self, format: str) -> bool:
        """True of its format."""
        return format == self.format

    def support(self, format: str, device: torch.device) -> Support:
        """The device's products of 8-bit numbers."""
        return native_support(format, device)

    def cost(self, format: str, device: torch.device) -> float | None:
        """None: it depends on the size of a layer, see :meth:`is_worthwhile`."""
        return None

    def is_worthwhile(self, shape: Sequence[int], scaling: str) -> bool:
        """True if products with a weight are faster than in 16 bits, casts included, as far as that is known.

        Args:
            shape: Of the weight: [out_features, in_features].
            scaling: ``"tensor"`` or ``"row"``.
        """
        return True

    def region(self, format: str, device_type: str) -> Region:
        """Not to be asked: a region of products lies within one of 16 bits, see :meth:`region_within`.

        Raises:
            AssertionError: always.
        """
        raise AssertionError(f"{format} has no region of its own")

    def region_within(self, surrounding: Region, scaling: str, gradients: str) -> Region:
        """The state for a layer whose products are in 8 bits.

        Args:
            surrounding: That of its other operations, in 16 bits.
            scaling: ``"tensor"`` or ``"row"``.
            gradients: ``"all"``, ``"input"`` or ``"none"``.

        Raises:
            SupportError: The device has no such products, and is not to emulate them.
        """
        is_around_emulated = surrounding.mode is not None
        products = Products(self.format, scaling, gradients, self._checked(), is_around_emulated)
        return EmulatedRegion(surrounding, narrow_linear(surrounding.dtype, products))

    @property
    def is_emulated(self) -> bool:
        """True if 8-bit operands are multiplied in fp32."""
        return self.emulate is True or (self.emulate == "auto" and not self._present_support.native)

    @property
    def _present_support(self) -> Support:
        """The support of the device; one that is not here has it."""
        is_here = self.device != "cuda" or torch.cuda.is_available()
        return native_support(self.format, self.device) if is_here else Support(True, "it is not here")

    def _checked(self) -> bool:
        # torch's kernel of fp8 for CPUs, which converts to fp32, is right; the one of integers may be wrong.
        has_kernel = self.device == "cpu" and not get_format(self.format).is_integer
        if self.emulate is False and not has_kernel and not (support := self._present_support).native:
            raise SupportError(
                f"layers are to compute in {self.format} with emulate=False, but {support.reason}; use emulate='auto', "
                "or bf16"
            )
        return self.is_emulated


class WithoutNarrow:
    """The state of a layer inside one whose products are in 8 bits, and which itself has none of them.

    Args:
        own: Its state elsewhere.
    """

    def __init__(self, own: Region) -> None:
        self.own, self.dtype, self.mode = own, own.dtype, own.mode

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Everything within computes as it would outside."""
        with contextlib.ExitStack() as stack:
            while _is_in_narrow():
                stack.enter_context(_pop_mode_temporarily())
            stack.enter_context(self.own.context())
            yield

    def call(
        self,
        was_on: bool,
        was: torch.dtype,
        compute: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call as it would be outside."""
        if _is_in_narrow():
            with _pop_mode_temporarily():
                return self.call(was_on, was, compute, args, kwargs)
        return self.own.call(was_on, was, compute, args, kwargs)


def _is_in_narrow() -> bool:
    c: Any = torch._C
    depth = c._len_torch_function_stack()
    return depth > 0 and isinstance(c._get_function_stack_at(depth - 1), NarrowLinear)
