"""The error that a format makes of each layer's output, weighed by the gradient there, while a step runs in fp32.

Just before a layer is called, it is called in each format that is looked at, with the same inputs and the same random
numbers, its own operations in the format and the layers inside it in fp32. The difference to what it then gives in fp32
waits for the gradient that arrives there in backward.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.backends import Emulate
from lightning_mixprec.engine.border_plan import Site
from lightning_mixprec.engine.objects import copied, tensors_in
from lightning_mixprec.errors import TraceLeftError, one_line
from lightning_mixprec.evidence.instruments.memory import is_out_of_memory
from lightning_mixprec.evidence.instruments.own_dtypes import HookOf, hookable
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.measuring.one_layer import in_format, unchanged
from lightning_mixprec.policy.assignment import LayerPrecision

BORDER = "border"
"""What stands in a format's place for the rounding of a layer's output to bf16."""


class LayerErrors:
    """Takes the errors of some layers while a step runs.

    The differences of these layers are kept from their forward to their backward: for each format four bytes for an
    element of an output.

    Args:
        sites: The layers, by the sites that they are called at.
        formats: By the name of a site the formats to look at.
        base: What each layer is assigned in fp32.
        device: The device that they run on.
        emulate: As for :func:`~lightning_mixprec.engine.apply.attach`.
        has_borders: Whether the rounding of outputs to bf16 counts as well, as if it were a format, ``BORDER``.

    Attributes:
        squares: By layer and format the sum over elements of (gradient x error)^2, fp64 on the device.
        sums: By layer and format the sum over elements of gradient x error.
        problems: By layer and format why it could not be called there.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        formats: Mapping[str, Sequence[str]],
        base: Mapping[str, LayerPrecision],
        device: torch.device,
        emulate: Emulate = "auto",
        has_borders: bool = False,
    ) -> None:
        self._has_borders = has_borders
        self._sites = {site.name: site for site in sites}
        self._formats, self._base, self._device, self._emulate = formats, base, device, emulate
        self._handles: list[RemovableHandle] = []
        self._waiting: dict[str, list[dict[str, list[Tensor]]]] = {}
        self._is_busy = False
        self.squares: dict[tuple[str, str], Tensor] = {}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.problems: dict[tuple[str, str], str] = {}

    def __enter__(self) -> "LayerErrors":
        for name, module in hookable({name: site.module for name, site in self._sites.items()}).items():
            before, after = (HookOf(module, partial(each, name)) for each in (self._before, self._after))
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, prepend=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._waiting.clear()

    @property
    def _is_looking(self) -> bool:
        """True where a gradient will arrive: not inside a layer that is being tried, nor where there is no graph."""
        return not self._is_busy and torch.is_grad_enabled()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_looking:
            tried = {format: self._tried(name, format, args, kwargs) for format in self._formats[name]}
            self._waiting.setdefault(name, []).append(tried)

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._is_looking or not self._waiting.get(name):
            return
        results = self._waiting[name].pop()
        for place, tensor in enumerate(_floating(output)):
            errors = {}
            if self._has_borders and tensor.dtype == torch.float32:
                errors[BORDER] = tensor.detach().to(torch.bfloat16).float() - tensor.detach()
            for format, result in results.items():
                if len(result) > place and result[place].shape == tensor.shape:
                    errors[format] = result[place].to(torch.float32) - tensor.detach()
            if tensor.requires_grad and errors:
                tensor.register_hook(partial(self._weigh, name, errors))

    def _weigh(self, name: str, errors: Mapping[str, Tensor], gradient: Tensor) -> None:
        with torch.no_grad():
            for format, error in errors.items():
                changes = gradient.double() * error
                for kept, added in ((self.squares, changes.square().sum()), (self.sums, changes.sum())):
                    kept[name, format] = kept[name, format] + added if (name, format) in kept else added

    def _tried(self, name: str, format: str, args: Any, kwargs: Any) -> list[Tensor]:
        """What a layer gives in a format; nothing if it fails there, which is noted."""
        if (name, format) in self.problems:
            return []
        site, random = self._sites[name], RandomState(self._device, others=False)
        self._is_busy = True
        try:
            with (
                unchanged(site.module),
                in_format(site, format, self._base, self._device, self._emulate),
                torch.no_grad(),
            ):
                own_args, own_kwargs = copied((args, kwargs))
                return _floating(site.module.forward(*own_args, **own_kwargs))
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, TraceLeftError):
                raise
            self.problems[name, format] = one_line(error)
            return []
        finally:
            self._is_busy = False
            random.restore()


def _floating(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
