"""Sensitivities add up over variables, and come back from their plain form as they went."""

import json

import pytest

from lightning_mixprec.errors import PlanError
from lightning_mixprec.planning.sensitivity import Offer, Sensitivities

_MEASURED = Sensitivities(
    (("a",), ("b", "c")),
    (
        {"fp32": Offer(0.0), "bf16": Offer(1.0)},
        {"fp32": Offer(0.0), "bf16": Offer(0.5), "fp16": Offer(0.1, "overflows")},
    ),
    "fp32",
    3,
)


def test_the_parts_of_variables_add_up() -> None:
    assert _MEASURED.squared_gap({"a": "bf16", "b": "bf16", "c": "bf16"}) == 1.5
    assert _MEASURED.squared_gap({"a": "fp32", "b": "bf16", "c": "bf16"}) == 0.5
    assert _MEASURED.squared_gap({}) == 0.0


def test_they_come_back_from_json() -> None:
    assert Sensitivities.from_dict(json.loads(json.dumps(_MEASURED.to_dict()))) == _MEASURED


@pytest.mark.parametrize("change", [{"version": "2"}, {"offers": []}, {"variables": [["a"], [1]]}, {"batches": -1}])
def test_what_is_no_plain_form_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="measure them again"):
        Sensitivities.from_dict(_MEASURED.to_dict() | change)
