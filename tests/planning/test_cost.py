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


def _layer(flops: float, saved: float, gradient: float = 0.0, passing: float = 0.0) -> dict[str, LayerCost]:
    """Twice as much saved in fp32 as in bf16."""
    return {
        "fp32": LayerCost(2.0, 3 * gradient, saved, flops, gradient, passing),
        "bf16": LayerCost(1.0, 3 * gradient, saved / 2, flops, gradient, passing / 2),
    }


def _chain() -> Costs:
    """A product, an activation whose output it and the next product keep, that product, and the model around them."""
    layers = {"one": _layer(8.0, 40.0, 4.0), "act": _layer(0.0, 80.0), "two": _layer(8.0, 0.0, 100.0, 16.0)}
    handovers = Handover("one", "act", 20.0), Handover("act", "two", 20.0, 20.0)
    return Costs("cpu", {**layers, "": _layer(0.0, 0.0)}, handovers, 0.0, 7.0, 0.5)


@pytest.mark.parametrize(
    ("formats", "saved"),
    [
        (("fp32", "fp32", "fp32", "fp32"), 40 + 80),
        (("bf16", "bf16", "bf16", "bf16"), 20 + 40),
        (("bf16", "fp32", "bf16", "bf16"), 20 + 80 + 2 * 20),  # the activation's output is kept in both formats
        (("fp32", "bf16", "bf16", "bf16"), 40 + 80 + 2 * 20),  # it computes in fp32, which it is handed
        (("bf16", "bf16", "bf16", "fp32"), 20 + 80 + 2 * 20),  # so it does where the caller casts in between
        (("bf16", "bf16", "fp32", "bf16"), 20 + 40 + 4 * 20),
    ],
)
def test_saved_bytes_are_those_of_the_formats_in_effect(formats: tuple[str, ...], saved: float) -> None:
    costs = _chain()
    assert costs.saved_bytes(dict(zip(costs.layers, formats, strict=True))) == saved


def test_the_peak_is_where_gradients_have_come_and_what_was_saved_has_not_gone() -> None:
    costs = _chain()
    weights, gradients = 2 * (4 + 100), (4, 100)
    at_two = 120 + gradients[1] + 16
    at_one = 40 + sum(gradients)
    assert costs.of_step(dict.fromkeys(costs.layers, "fp32")).memory_bytes == 7 + weights + max(at_two, at_one)
    assert costs.of_step(dict.fromkeys(costs.layers, "bf16")).seconds == 4.0


def test_a_measured_step_scales_all_times() -> None:
    costs = _MEASURED.calibrated(4.5)
    assert costs.predicted({"a": "fp32", "b": "fp32"}).seconds == pytest.approx(4.5)
    assert (costs.fixed_seconds, costs.seconds_per_cast_byte) == (0.5, 0.005)
    assert costs.predicted({"a": "fp32", "b": "fp32"}).memory_bytes == 1420.0


def test_a_file_without_a_note_is_read() -> None:
    plain = _MEASURED.to_dict()
    del plain["note"]
    assert Costs.from_dict(plain) == _MEASURED


@pytest.mark.parametrize("wide", ["", "up", "down"])
def test_a_wide_layer_on_the_way_from_one_to_another_casts_what_it_hands_on(wide: str) -> None:
    names = "up.product", "up", "down.act", "down", ""
    layers = {name: _layer(8.0 if name == "up.product" else 0.0, 64.0 if name == "down.act" else 0.0) for name in names}
    costs = Costs("cpu", layers, (Handover("up.product", "down.act", 16.0),), 0.0, 0.0, 0.0)
    narrow = dict.fromkeys(names, "bf16")
    assert costs.saved_bytes(narrow) == 32.0
    assert costs.saved_bytes({**narrow, wide: "fp32"}) == 64.0  # the activation is handed fp32
