"""Costs add up over layers and handovers, and come back from their plain form as they went."""

import json

import pytest

from lightning_mixprec.errors import PlanError
from lightning_mixprec.planning.cost import Costs, Handover, LayerCost

_MEASURED = Costs(
    "cpu",
    {
        "a": {"fp32": LayerCost(3.0, 400.0, 40.0, 10.0), "bf16": LayerCost(1.0, 600.0, 20.0, 10.0)},
        "b": {"fp32": LayerCost(5.0, 800.0, 80.0, 30.0), "bf16": LayerCost(2.0, 1200.0, 40.0, 30.0)},
    },
    (Handover("a", "b", 10.0),),
    fixed_seconds=1.0,
    fixed_bytes=100.0,
    seconds_per_cast_byte=0.01,
)


def test_what_layers_take_adds_up() -> None:
    predicted = _MEASURED.predicted({"a": "fp32", "b": "fp32"})
    assert (predicted.seconds, predicted.memory_bytes, predicted.low_precision_share) == (9.0, 1420.0, 0.0)


def test_a_border_costs_time_and_memory_and_no_border_nothing() -> None:
    cast = _MEASURED.handover_cost(_MEASURED.handovers[0], "fp32", "bf16")
    mixed = _MEASURED.predicted({"a": "fp32", "b": "bf16"})
    assert _MEASURED.handover_cost(_MEASURED.handovers[0], "bf16", "bf16") == {}
    assert mixed.seconds == pytest.approx(1 + 3 + 2 + cast["time"])
    assert mixed.memory_bytes == pytest.approx(100 + 440 + 1240 + cast["memory"])
    assert mixed.low_precision_share == 0.75


def test_they_come_back_from_json() -> None:
    assert Costs.from_dict(json.loads(json.dumps(_MEASURED.to_dict()))) == _MEASURED


@pytest.mark.parametrize("change", [{"version": 1}, {"layers": {"a": {"fp32": 3.0}}}, {"device": None}])
def test_what_is_no_plain_form_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="measure them again"):
        Costs.from_dict(_MEASURED.to_dict() | change)
