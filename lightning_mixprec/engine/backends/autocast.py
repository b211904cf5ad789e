"""torch's autocast: 16-bit formats with autocast on, wider ones with autocast off."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import (
    get_autocast_dtype,
    is_autocast_cache_enabled,
    is_autocast_enabled,
    set_autocast_cache_enabled,
    set_autocast_dtype,
    set_autocast_enabled,
)

from lightning_mixprec.engine.backends.replacing import Replacing
from lightning_mixprec.numerics.devices import Support, native_support
from lightning_mixprec.numerics.formats import FORMATS, Format, get_format


class Autocast:
    """The backend of formats that torch has operations for.

    >>> Autocast().computes("bf16"), Autocast().computes("fp64"), Autocast().computes("fp8")
    (True, True, False)
    """

    def computes(self, format: str) -> bool:
        """True of the formats that the table says are computed in, from 16 bits on."""
        known = FORMATS.get(format)
        return isinstance(known, Format) and known.use.is_computed_in and known.bits >= 16

    def support(self, format: str, device: torch.device) -> Support:
        """The device's own arithmetic; where it has none, torch's kernels convert at each step."""
        return native_support(format, device)

    def cost(self, format: str, device: torch.device) -> float | None:
        """None: torch does not say, and measures nothing."""
        return None

    def region(self, format: str, device_type: str) -> "AutocastRegion":
        """Autocast to the format's dtype, or none."""
        described = get_format(format)
        return AutocastRegion(device_type, described.forward.dtype, described.is_half)


class AutocastRegion:
    """Autocast's state in a part of a model.

    Its cache of cast weights is off, as under Lightning's plugins: the uses of a weight would share one cast, and their
    gradients would be summed in 16 bits.

    Args:
        device: The device type.
        dtype: The dtype that operations compute in.
        is_on: Whether autocast casts to it; without, operations compute in what they are given.
    """

    def __init__(self, device: str, dtype: torch.dtype, is_on: bool) -> None:
        self.device, self.dtype, self.is_on = device, dtype, is_on
        self.mode: Replacing | None = None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast for everything within, or none.

        Where there is no CUDA device, torch.autocast would switch itself off: fake tensors compute as on one.
        """
        if self.is_on and self.device == "cuda" and not torch.cuda.is_available():
            return self._switched()
        if self.is_on:
            return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)
        if is_autocast_enabled(self.device):
            return torch.autocast(self.device, enabled=False)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        """Autocast on, by the flags that torch.autocast sets."""
        device, did_cache = self.device, is_autocast_cache_enabled()
        was_on, was = is_autocast_enabled(device), get_autocast_dtype(device)
        try:
            set_autocast_enabled(device, True)
            set_autocast_dtype(device, self.dtype)
            set_autocast_cache_enabled(False)
            yield
        finally:
            set_autocast_enabled(device, was_on)
            set_autocast_dtype(device, was)
            set_autocast_cache_enabled(did_cache)

    def call(
        self,
        was_on: bool,
        was: torch.dtype,
        compute: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call with autocast switched, and switched back after it."""
        device, is_on = self.device, self.is_on
        did_cache = is_on and is_autocast_cache_enabled()
        try:
            set_autocast_enabled(device, is_on)
            if is_on:
                set_autocast_dtype(device, self.dtype)
                set_autocast_cache_enabled(False)
            return compute(args, kwargs)
        finally:
            set_autocast_enabled(device, was_on)
            if is_on:
                set_autocast_dtype(device, was)
                set_autocast_cache_enabled(did_cache)
