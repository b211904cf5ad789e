"""Attention modules kept off the fused inference paths that take no notice of a layer's format.

In eval mode ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` compute with their children's weights in one
fused operation, so that no child's border is ever entered, and on CPU the fused operations of ``nn.MultiheadAttention``
ignore autocast.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.casting import cast

FUSED = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)


def stay_off(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing: an encoder layer leaves its fused path where a module inside it has a hook."""


def arrive_cast(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook that casts attention's inputs as its first projection would; the fused path takes none that were cast."""
    query = args[0] if args else kwargs.get("query")
    if module.training or not isinstance(query, torch.Tensor) or not torch.is_autocast_enabled(query.device.type):
        return None
    casts = {torch.float32: torch.get_autocast_dtype(query.device.type)}
    names = [name for name in ("query", "key", "value") if name in kwargs]
    cast_args, cast_kwargs = cast((args[:3], {name: kwargs[name] for name in names}), casts)
    return (*cast_args, *args[3:]), kwargs | cast_kwargs


class FastPaths:
    """The modules kept off their fused paths, and what that changed on them."""

    def __init__(self) -> None:
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self._nested: dict[nn.Module, bool] = {}

    def keep_off(self, modules: Iterable[nn.Module]) -> None:
        """Keeps exactly these off, and lets all others on again."""
        chosen = list(modules)
        for module in self._handles.keys() - set(chosen):
            self._handles.pop(module).remove()
        for module in self._nested.keys() - set(chosen):
            module.__dict__["use_nested_tensor"] = self._nested.pop(module)
        for module in chosen:
            if module not in self._handles and module not in self._nested:
                self._add(module)

    def _add(self, module: nn.Module) -> None:
        if isinstance(module, nn.MultiheadAttention):
            self._handles[module] = module.register_forward_pre_hook(arrive_cast, with_kwargs=True)
        elif isinstance(module, nn.TransformerEncoderLayer):
            self._handles[module] = module.register_forward_hook(stay_off)
        elif "use_nested_tensor" in module.__dict__:
            self._nested[module] = module.__dict__["use_nested_tensor"]
            module.__dict__["use_nested_tensor"] = False


def strip(module: nn.Module) -> None:
    """Takes the hooks off a copy of a module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook is stay_off or hook is arrive_cast]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
