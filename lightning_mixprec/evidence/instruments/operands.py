"""Operands of products in 8 bits before they are cast: the cast hides what it loses, and never overflows."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixprec.evidence.instruments.own_dtypes import HookOf, OwnDtypes
from lightning_mixprec.evidence.instruments.probe import Observer, leaving_out, whole
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.numerics.rates import underflows
from lightning_mixprec.numerics.scaled import largest_magnitude
from lightning_mixprec.policy.assignment import LayerPrecision

OPERANDS = ("input", "weight", "gradient")


class OperandObserver(Observer):
    """An observer that counts, too, what 8 bits with a scale of their own would make of the operands it sees.

    Of a large operand whole rows are looked at, evenly spaced; its scale, where it has one, is that of all of it.

    Args:
        layers: The modules by name.
        precisions: What they are assigned, by the same names.
        max_elements: How many elements of a tensor are looked at; None for all.
        own: As for any observer.
        scale: As for any observer.
        among: As for any observer.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        precisions: Mapping[str, LayerPrecision],
        max_elements: int | None,
        own: OwnDtypes | None = None,
        scale: float | Tensor = 1.0,
        among: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(layers, max_elements, own, scale, among)
        self._narrow = {name: layer for name, layer in precisions.items() if layer.has_narrow_products}
        self._counts: dict[tuple[str, str], Tensor] = {}

    def __enter__(self) -> "OperandObserver":
        super().__enter__()
        for name in self._narrow:
            layer = self._layers[name]
            hook = layer.register_forward_pre_hook(HookOf(layer, partial(self._on_call, name)))
            self._handles.append(hook)
        return self

    def counts(self, device: torch.device) -> Tensor:
        """Of each layer's operands the elements that round to zero, and all finite ones other than zero.

        Returns:
            fp64 [layers, operands, 2]; zeros for a layer whose products are not in 8 bits, and for an operand that is
            not cast.
        """
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        rows = [[self._counts.get((name, each), nothing) for each in OPERANDS] for name in self._layers]
        return torch.stack([torch.stack(row) for row in rows])

    def _on_call(self, name: str, module: nn.Module, args: Any) -> None:
        with leaving_out(name, self.left_out):
            if args and isinstance(args[0], Tensor):
                self._count(name, "input", args[0])
            if (name, "weight") not in self._counts:
                self._count(name, "weight", module.get_parameter("weight"))

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        super()._on_gradient(name, gradient)
        if name in self._narrow and self._narrow[name].eight_bits.gradients != "none":
            with leaving_out(name, self.left_out):
                self._count(name, "gradient", gradient)

    def _count(self, name: str, operand: str, tensor: Tensor) -> None:
        layer = self._narrow[name]
        format = get_format(layer.compute)
        target = format.backward if operand == "gradient" else format.forward
        matrix = whole(tensor).detach()
        matrix = matrix.reshape(-1, matrix.shape[-1])
        is_per_row = layer.eight_bits.scaling == "row"
        if self._max_elements is not None and matrix.numel():
            seen = matrix[:: math.ceil(matrix.numel() / self._max_elements)]
        else:
            seen = matrix
        scale = largest_magnitude(seen if is_per_row else matrix, per_row=is_per_row)
        counted = torch.stack(underflows(seen * (target.max / scale), target, 1.0)).double()
        self._counts[name, operand] = self._counts.get((name, operand), 0) + counted
