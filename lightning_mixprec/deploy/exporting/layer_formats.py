"""The formats of layers, read from the operations of a written graph, and compared with those that were assigned."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lightning_mixprec.errors import ExportError
from lightning_mixprec.numerics.formats import FORMATS, is_wider
from lightning_mixprec.policy.assignment import LayerPrecision


class Use(NamedTuple):
    """An operation of a layer in a graph.

    Attributes:
        layer: The layer's name.
        operation: What the graph calls it.
        is_product: Whether it is a matrix product, a convolution, attention or a recurrent layer.
        formats: Those of the floating tensors that it takes; of a product of 8 bits that of its operands.
    """

    layer: str
    operation: str
    is_product: bool
    formats: frozenset[str]


def read_layers(uses: Iterable[Use]) -> dict[str, str]:
    """The format of each layer that computes: that of its products, or else the widest that its operations take.

    >>> read_layers([Use("0", "linear", True, frozenset({"bf16"})), Use("1", "layer_norm", False, frozenset({"fp32"}))])
    {'0': 'bf16', '1': 'fp32'}
    """
    grouped: dict[str, list[Use]] = {}
    for use in uses:
        if use.formats:
            grouped.setdefault(use.layer, []).append(use)
    return {layer: _widest(_of_products(group) or group) for layer, group in grouped.items()}


def check_layers(uses: Iterable[Use], assigned: Mapping[str, LayerPrecision], file: str) -> None:
    """Checks that a written graph computes each layer in its format.

    A layer's products have exactly its format. Its other operations may be wider, as autocast leaves some of them; in
    another 16-bit format, or narrower, they may not be.

    Args:
        uses: The operations of the graph.
        assigned: What was assigned.
        file: What kind of file it is.

    Raises:
        ExportError: A layer computes in another format; the message names it.
    """
    for use in uses:
        if use.layer not in assigned:
            continue
        layer = assigned[use.layer]
        wanted = layer.compute if use.is_product else layer.region
        for found in sorted(use.formats):
            if found == wanted or (not use.is_product and is_wider(found, wanted)):
                continue
            raise ExportError(
                f"layer {use.layer!r} is assigned {wanted}, and its {use.operation} is in {found} in the {file} file, "
                f"which was not kept; give the layer {found} in the policy, or export to another format"
            )


def _of_products(uses: list[Use]) -> list[Use]:
    return [use for use in uses if use.is_product]


def _widest(uses: list[Use]) -> str:
    found = frozenset[str]().union(*(use.formats for use in uses))
    return min(found, key=list(FORMATS).index)
