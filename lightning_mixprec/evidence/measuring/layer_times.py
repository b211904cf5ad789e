"""The time that a layer's forward and backward take in each format, while a step runs in fp32."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.border_plan import Site
from lightning_mixprec.engine.casting import cast
from lightning_mixprec.engine.objects import copied, mapped, tensors_in
from lightning_mixprec.errors import TraceLeftError
from lightning_mixprec.evidence.instruments.memory import is_out_of_memory
from lightning_mixprec.evidence.instruments.own_dtypes import HookOf, hookable
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.measuring.one_layer import in_format, unchanged
from lightning_mixprec.numerics.devices.timing import seconds_at, seconds_of
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.policy.assignment import LayerPrecision

TRIES = 3
"""How often a thing is timed; the shortest counts."""

_CAST_ELEMENTS = 2**20

_known: dict[tuple[Any, ...], float] = {}
"""The times that were measured in this process, by what they are of."""


class LayerTimes:
    """Times layers just before they are called, on the inputs that they are about to be called with.

    Each format in turn, several times, and the shortest counts. A layer of the same class, attributes, weights and
    inputs as one that was timed before is not timed again in this process.

    Args:
        sites: The layers, by the sites that they are called at; none of them calls another.
        formats: By the name of a site its formats.
        base: What each layer is assigned in fp32.
        device: The device that they run on.

    Attributes:
        seconds: By layer and format, over all calls in a step; missing where the layer fails.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        formats: Mapping[str, Sequence[str]],
        base: Mapping[str, LayerPrecision],
        device: torch.device,
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self._formats, self._base, self._device = formats, base, device
        self._handles: list[RemovableHandle] = []
        self.seconds: dict[tuple[str, str], float] = {}

    def __enter__(self) -> "LayerTimes":
        for name, module in hookable({name: site.module for name, site in self._sites.items()}).items():
            hook = HookOf(module, partial(self._time, name))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _time(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        keys = {format: (format, self._device, *_signature(module, args, kwargs)) for format in self._formats[name]}
        if not all(key in _known for key in keys.values()):
            for format, seconds in self._tried(name, args, kwargs).items():
                _known[keys[format]] = seconds
        for format, key in keys.items():
            if key in _known:
                self.seconds[name, format] = self.seconds.get((name, format), 0.0) + _known[key]

    def _tried(self, name: str, args: Any, kwargs: Any) -> dict[str, float]:
        site, best = self._sites[name], dict[str, float]()
        failed = set[str]()
        random = RandomState(self._device, others=False)
        for _ in range(TRIES + 1):  # the first is for kernels to be made
            for format in self._formats[name]:
                if format in failed:
                    continue
                random.restore()
                try:
                    with unchanged(site.module), in_format(site, format, self._base, self._device):
                        best.setdefault(format, float("inf"))
                        seconds = self._once(site.module, format, args, kwargs)
                except Exception as error:
                    if is_out_of_memory(error) or isinstance(error, TraceLeftError):
                        raise
                    failed.add(format)
                    best.pop(format, None)
                else:
                    best[format] = min(best[format], seconds)
        random.restore()
        return best

    def _once(self, module: nn.Module, format: str, args: Any, kwargs: Any) -> float:
        """Forward and backward with inputs in the format, as neighbours in it would give them.

        What it keeps for backward is its own: activation checkpointing around the layer counts what it is to recompute.
        """
        region = LayerPrecision("fp32", format).region
        narrow = {torch.float32: get_format(region).dtype} if get_format(region).is_half else {}
        given = cast(copied((args, kwargs)), narrow)
        inputs = [each.requires_grad_() for each in tensors_in(given) if each.is_floating_point()]
        inputs += [each for each in module.parameters() if each.requires_grad]
        args, kwargs = mapped(given, torch.clone)  # which the layer may write into
        start = seconds_at(self._device)
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            output = [each for each in tensors_in(module.forward(*args, **kwargs)) if each.requires_grad]
        if output and inputs:
            with torch.autocast(self._device.type, enabled=False):
                torch.autograd.grad(output, inputs, [torch.ones_like(each) for each in output], allow_unused=True)
        return seconds_at(self._device) - start


def cast_seconds(device: torch.device) -> float:
    """The time that a cast from fp32 to 16 bits takes, for each byte that it reads and writes."""
    key = ("cast", device)
    if key not in _known:
        numbers = torch.ones(_CAST_ELEMENTS, device=device)
        taken = [seconds_of(lambda: numbers.to(torch.bfloat16), device) for _ in range(TRIES + 1)]
        _known[key] = min(taken[1:]) / (_CAST_ELEMENTS * 6)
    return _known[key]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _signature(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What the time of a layer depends on."""
    given = tuple((tuple(each.shape), each.dtype, each.stride()) for each in tensors_in((args, kwargs)))
    weights = tuple((name, tuple(each.shape), each.dtype) for name, each in module.named_parameters())
    return type(module), module.training, module.extra_repr(), weights, given
