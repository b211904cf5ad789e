"""Formats of layers, from the operations in a graph."""

import pytest

from lightning_mixprec import MixPrecError
from lightning_mixprec.deploy.exporting.layer_formats import Use, check_layers, read_layers
from lightning_mixprec.policy.assignment import LayerPrecision


def use(operation, *formats, is_product=False):
    return Use("layer", operation, is_product, frozenset(formats))


def test_products_decide():
    assert read_layers([use("add", "fp32"), use("linear", "bf16", is_product=True)]) == {"layer": "bf16"}


def test_without_products_the_widest_counts():
    assert read_layers([use("relu", "bf16"), use("exp", "fp32"), use("arange")]) == {"layer": "fp32"}


@pytest.mark.parametrize(
    ("compute", "found", "is_product", "is_kept"),
    [
        ("bf16", "bf16", True, True),
        ("bf16", "fp32", True, False),
        ("bf16", "fp32", False, True),  # autocast leaves some operations wider
        ("bf16", "fp16", False, False),
        ("fp32", "bf16", False, False),
        ("fp32", "fp64", True, False),
        ("int8", "int8", True, True),
        ("int8", "bf16", True, False),
        ("int8", "bf16", False, True),  # what is around its products
    ],
)
def test_what_is_not_as_assigned_is_named(compute, found, is_product, is_kept):
    uses, layers = [use("operation", found, is_product=is_product)], {"layer": LayerPrecision("fp32", compute)}
    if is_kept:
        check_layers(uses, layers, "pt2")
        return
    with pytest.raises(MixPrecError, match=f"layer 'layer' is assigned .*, and its operation is in {found}"):
        check_layers(uses, layers, "pt2")
