"""Sensitivities add up over variables, and come back from their plain form as they went."""

import json
from dataclasses import replace

import pytest

from lightning_mixprec.errors import PlanError
from lightning_mixprec.planning.sensitivity import Border, Offer, Sensitivities

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


def _met() -> Sensitivities:
    """A product in a layer that only passes on."""
    offers = {"fp32": Offer(0.0), "bf16": Offer(4.0), "fp16": Offer(0.25)}, {"fp32": Offer(0.0), "bf16": Offer(0.0)}
    borders = Border("out.one", "out", 5.0), Border("out", "", 6.0)
    return Sensitivities((("out.one",), ("out",), ("",)), (*offers, offers[1]), "fp32", 1, borders)


@pytest.mark.parametrize(
    ("formats", "gap"),
    [
        (("bf16", "bf16", "bf16"), 4.0),
        (("fp16", "fp16", "fp16"), 0.25),
        (("fp16", "fp32", "bf16"), 0.25),  # into fp32 nothing is rounded
        (("fp16", "bf16", "bf16"), 0.25 + 4.75),  # what comes out is rounded to bf16; its rounding to fp16 is in it
        (("bf16", "fp16", "fp16"), 4.0 + 1.0),  # which is in the product's own error, all but a part
        (("fp16", "bf16", "fp16"), 0.25 + 4.75 + 6.0),  # a layer in bf16 that only passes on, among others in fp16
    ],
)
def test_numbers_in_fp16_are_rounded_where_they_meet_bf16(formats: tuple[str, ...], gap: float) -> None:
    found = _met().squared_gap(dict(zip(("out.one", "out", ""), formats, strict=True)))
    assert found == pytest.approx(gap)


def test_borders_come_back_from_a_file_and_files_without_them_are_read() -> None:
    plain = json.loads(json.dumps(_met().to_dict()))
    assert Sensitivities.from_dict(plain) == _met()
    del plain["borders"]
    assert Sensitivities.from_dict(plain) == replace(_met(), borders=())
