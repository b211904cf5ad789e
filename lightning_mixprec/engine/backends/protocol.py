"""The protocol of a backend: one way to compute in some formats."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from lightning_mixprec.engine.backends.replacing import Replacing
from lightning_mixprec.numerics.devices import Support


class Region(Protocol):
    """The state in which a part of a model computes in one format, on one type of device.

    Attributes:
        dtype: The dtype that its operations compute in, as code inside the part sees it.
        mode: What replaces functions of torch within; None if nothing does. Checkpointing computes a module anew in
            backward, where no region is entered but autocast is as it was: borders enter a region that has a mode even
            where autocast is in its state already, unless the mode is entered.
    """

    dtype: torch.dtype

    @property
    def mode(self) -> Replacing | None:
        """What replaces functions of torch within."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes in the format. For the model's own operations and for compiled borders."""

    def call(
        self,
        was_on: bool,
        was: torch.dtype,
        compute: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One call in the format, from surroundings in another one. Written out flat: this is what a border costs.

        Args:
            was_on: Whether autocast is on around the call.
            was: The dtype of autocast there.
            compute: What is called, with the two arguments that follow.
            args: Positional arguments.
            kwargs: Arguments by name.
        """


class Backend(Protocol):
    """One way to compute in some formats."""

    def computes(self, format: str) -> bool:
        """True if it computes in a format, quickly or not."""

    def support(self, format: str, device: torch.device) -> Support:
        """The support of a device for a format that it computes: native arithmetic or none, and the reason."""

    def cost(self, format: str, device: torch.device) -> float | None:
        """The time of a product as a multiple of its time in fp32; None where nobody measured it."""

    def region(self, format: str, device_type: str) -> Region:
        """The state for a part of a model.

        Args:
            format: A format that it computes.
            device_type: ``"cuda"`` or ``"cpu"``.
        """
