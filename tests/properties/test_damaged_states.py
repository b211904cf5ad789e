"""What a checkpoint may hold in the place of our states: it is taken and the run goes on, or one line refuses it."""

import copy
import json
import math

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plugin_models import Call, fit, one_line, ours, overflowing, task

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    MixPrecError,
    OverflowMonitor,
    PrecisionScheduler,
    UnderflowMonitor,
)
from lightning_mixprec.optim.loss_scaling import LossScaler
from lightning_mixprec.optim.loss_scaling_options import LossScaling

ODD = st.sampled_from(
    [None, True, -1, 0, 2**70, 1.5, math.nan, math.inf, "", "fp16", "x\ny", [], [1], {}, {"a": 1}, b"x"]
).map(copy.deepcopy)


def places(value, path=()):
    """Every way into a nested structure, the whole of it first."""
    yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from places(entry, (*path, number))


@st.composite
def damaged(draw, state):
    """The state with a part of it lost, replaced or added."""
    state = copy.deepcopy(state)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([path for path in places(state) if path]))
        at = state
        for key in way:
            at = at[key]
        how = draw(st.sampled_from(["lose", "replace", "replace", "add"]))
        if how == "lose":
            del at[last]
        elif how == "replace":
            at[last] = draw(ODD)
        elif isinstance(at, dict):
            at["added"] = draw(ODD)
        else:
            at.append(draw(ODD))
    return state


def is_refused(load, state):
    """Whether it is, in one line; anything but an error of ours fails the test."""
    try:
        load(state)
    except MixPrecError as error:
        assert len(str(error).splitlines()) == 1
        return True
    return False


@pytest.mark.filterwarnings("ignore:The checkpoint's loss scale is")
def test_the_plugin_takes_a_state_whole_or_not_at_all():
    plugin = ours({"default": "fp16", "net.0": "fp32"}, on_policy_change="accept")
    checked = []

    def check(run, model):
        good = json.loads(json.dumps(plugin.state_dict()))

        @given(damaged(good))
        @settings(max_examples=150)
        def loading(state):
            plugin.load_state_dict(copy.deepcopy(good))
            refused = is_refused(plugin.load_state_dict, state)
            checked.append(refused)
            now = plugin.state_dict()
            assert not refused or now == good
            assert 0 < plugin.scaler.get_scale() < math.inf
            assert plugin.skipped_steps >= 0
            assert repr(json.loads(json.dumps(now))) == repr(now)

        loading()
        plugin.load_state_dict(good)

    move = Call("on_train_batch_end", lambda run, model: plugin.edit_policy({"net.4": "bf16"}), at=0)
    fit(task(), plugin, callbacks=[*overflowing(), move, Call("on_train_batch_end", check, at=2)])
    assert any(checked)
    assert not all(checked)
    assert plugin.skipped_steps == 1


@given(st.dictionaries(st.sampled_from(["scale", "growth_tracker", "_growth_tracker", "overflows"]), ODD))
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore:The checkpoint's loss scale is")
def test_the_scaler_takes_a_state_or_refuses_it_in_one_line(state):
    options = LossScaling()
    scaler = LossScaler(options)
    is_refused(scaler.load_state_dict, state)
    assert options.min_scale <= scaler.get_scale() <= options.max_scale
    assert scaler.state_dict()["growth_tracker"] >= 0


CALLBACKS = [
    pytest.param(OverflowMonitor, id="overflow"),
    pytest.param(lambda: UnderflowMonitor(every_n_steps=2), id="underflow"),
    pytest.param(lambda: FidelityMonitor(every_n_steps=2), id="fidelity"),
    pytest.param(
        lambda: PrecisionScheduler([{"at": 0, "policy": "fp16"}, {"at": 2, "policy": "bf16"}]),
        id="scheduler",
    ),
    pytest.param(AdaptivePrecision, id="adaptive"),
]


@pytest.mark.parametrize("make", CALLBACKS)
def test_a_callback_goes_on_from_a_state_or_refuses_it_in_one_line(make):
    callback = make()
    fit(task(), ours("fp16"), callbacks=[callback, *overflowing()])
    good = json.loads(json.dumps(callback.state_dict()))
    model = task()

    def resumed(state):
        fresh = make()
        fit(model, ours("fp16"), callbacks=[Call("on_fit_start", lambda *_: fresh.load_state_dict(state)), fresh])
        fresh.state_dict()

    assert not is_refused(resumed, copy.deepcopy(good))

    @given(damaged(good))
    @settings(max_examples=20, phases=[Phase.generate], report_multiple_bugs=False)
    def loading(state):
        is_refused(resumed, state)

    loading()


FREE = {"evidence", "listed", "base", "in_force", "copy"}
"""What is said in plain values of any kind, and is compared or read as a policy where it is used."""


@pytest.mark.parametrize("make", CALLBACKS)
def test_a_callbacks_state_that_is_damaged_anywhere_is_refused_whole(make):
    callback = make()
    fit(task(), ours("fp16"), callbacks=[callback, *overflowing()])
    good = json.loads(json.dumps(callback.state_dict()))
    fresh = make()
    before = repr(fresh.state_dict())
    damages = [path for path in places(good) if path and not FREE & {*path}]
    for *way, last in damages:
        state = copy.deepcopy(good)
        at = state
        for key in way:
            at = at[key]
        at[last] = b"x"
        with pytest.raises(MixPrecError, match=f"{type(fresh).__name__} state (is damaged in|has version)") as caught:
            fresh.load_state_dict(state)
        one_line(caught)
        assert repr(fresh.state_dict()) == before
    assert len(damages) > len(good)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("came", [{"phase": 3, "at": "step 0", "step": 0, "epoch": 0, "change": "none"}]),
        ("came", [{"phase": 1, "at": "step 0", "step": 0, "epoch": 0, "change": "none"}] * 2),
        ("looks", [{"best": None, "looks": 0}]),
        ("values", {"policy_versions": 1.0}),
    ],
)
def test_parts_of_a_state_that_contradict_each_other_are_refused(part, value):
    scheduler = PrecisionScheduler([{"at": 0, "policy": "fp16"}, {"at": 2, "policy": "bf16"}])
    with pytest.raises(MixPrecError, match=f"PrecisionScheduler state is damaged in {part}") as caught:
        scheduler.load_state_dict({**scheduler.state_dict(), part: value})
    one_line(caught)


def test_a_state_of_this_version_may_lack_what_is_not_read_and_have_more():
    event = {"step": 3, "layer": "net.0", "direction": "forward", "verdict": "precision", "op": "addmm"}
    event |= {"format": "fp16", "value": 1e6, "fits": "bf16", "of a later release": [1]}
    monitor = OverflowMonitor()
    monitor.load_state_dict({**monitor.state_dict(), "events": [event], "more": 1})
    assert monitor.events == [event]


@pytest.mark.parametrize("promoted", [{"gone": "bf16"}, {"net.0": "fp7"}, {"net.0": "x\ny"}])
def test_promotions_that_the_model_cannot_have_are_refused_before_the_first_step(promoted):
    callback, again, model = AdaptivePrecision(), AdaptivePrecision(), task()
    fit(task(), ours("fp16"), callbacks=[callback])
    state = callback.state_dict()
    state["steered"]["controller"]["promoted"] = promoted
    with pytest.raises(MixPrecError, match="AdaptivePrecision state cannot be read") as caught:
        fit(model, ours("fp16"), callbacks=[Call("on_fit_start", lambda *_: again.load_state_dict(state)), again])
    one_line(caught)
    assert model.losses == []
