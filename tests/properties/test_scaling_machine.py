"""The loss scaler in any order of calls that a training may make, against the rule of its module's docstring.

The gradients are small dyadic numbers, so what an optimizer is to see is known to the last bit whatever the scale was.
"""

import math
import struct
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_mixprec.errors import ScalingError
from lightning_mixprec.optim.loss_scaling import LossScaler
from lightning_mixprec.optim.loss_scaling_options import LossScaling

SLOPES = (0.25, -0.5, 1.0, 3.0)
WHICH = st.integers(0, 2)


def fp32(number):
    return struct.unpack("f", struct.pack("f", number))[0]


@dataclass
class Scale:
    """The search for a scale, as documented; 1 without options."""

    options: LossScaling | None
    now: float = 1.0
    good: int = 0
    overflows: int = 0

    def start(self, scale):
        self.now, self.good, self.overflows = fp32(scale), 0, 0

    def bounded(self, scale):
        return fp32(min(max(scale, fp32(self.options.min_scale)), fp32(self.options.max_scale)))

    def batch(self, overflow):
        rule = self.options
        if overflow:
            self.good = 0
            self.overflows += 1
            if self.overflows >= rule.hysteresis:
                self.now = fp32(self.now * rule.backoff_factor)
        else:
            self.good += 1
            if self.good == rule.growth_interval:
                self.good = self.overflows = 0
                self.now = fp32(self.now * rule.growth_factor)
        self.now = self.bounded(self.now)


@dataclass
class Side:
    """One optimizer: its weights, the gradient that the user means, and what the scaler has said about it."""

    param: torch.nn.Parameter
    optimizer: torch.optim.Optimizer
    meant: float | None = None
    checked: bool = False
    is_leftover: bool = False
    seen: list = field(default_factory=list)

    @property
    def overflows(self):
        return self.meant is not None and not math.isfinite(self.meant)


def side(make):
    param = torch.nn.Parameter(torch.ones(2))
    one = Side(param, make([param]))
    one.optimizer.register_step_pre_hook(lambda *_: one.seen.append(None if param.grad is None else param.grad.clone()))
    return one


@st.composite
def scalings(draw):
    exact = draw(st.booleans())
    growth, backoff = draw(st.sampled_from([(2.0, 0.5), (4.0, 0.125)] if exact else [(1.5, 0.7), (2.5, 0.1)]))
    low, start, high = draw(st.sampled_from([(-3, 5, 14), (4, 5, 7), (0, 0, 9), (-2, 9, 9), (3, 3, 3)]))
    return LossScaling(
        init_scale=2.0**start,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=draw(st.integers(1, 3)),
        min_scale=2.0**low,
        max_scale=2.0**high,
        hysteresis=draw(st.integers(1, 3)),
    )


def bits(value):
    """A nested structure of tensors as something to compare, NaN included."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return [(key, bits(entry)) for key, entry in value.items()]
    return [bits(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class ScalerMachine(RuleBasedStateMachine):
    @initialize(options=scalings() | scalings() | scalings() | st.none(), guards=st.booleans())
    def begin(self, options, guards):
        self.scaler, self.model = LossScaler(options, guards=guards), Scale(options)
        self.model.start(options.init_scale if options else 1.0)
        self.found = []
        self.sides = [
            side(lambda params: torch.optim.SGD(params, lr=0.5)),
            side(lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5)),
            side(lambda params: torch.optim.Adam(params, lr=0.1)),
        ]

    @property
    def optimizers(self):
        return [one.optimizer for one in self.sides]

    @property
    def looks(self):
        return self.scaler.is_active or self.scaler.guards

    def check(self, one):
        """A gradient is looked at, once until the next backward."""
        if not one.checked and self.looks:
            one.checked = True
            if one.meant is not None:
                self.found.append(one.overflows)

    @rule(which=WHICH, slope=st.sampled_from([*SLOPES, *SLOPES, math.inf, math.nan]))
    def backward(self, which, slope):
        one = self.sides[which]
        if one.is_leftover:
            self.drop(which)
        self.scaler.scale((one.param * slope).sum()).backward()
        one.meant = (one.meant or 0.0) + slope
        for other in self.sides:
            other.checked = False

    @rule(which=WHICH)
    def unscale(self, which):
        one = self.sides[which]
        if one.is_leftover:
            return
        self.scaler.unscale_(one.optimizer)
        self.check(one)
        if self.looks:
            self.same(one.param.grad, one.meant)

    @rule(which=WHICH)
    def clip(self, which):
        one = self.sides[which]
        if one.is_leftover or one.meant is None:
            return
        self.unscale(which)
        one.param.grad.mul_(0.5)
        one.meant *= 0.5

    @rule(which=WHICH, then=st.sampled_from(["drop", "zero", "keep"]))
    def step(self, which, then):
        one = self.sides[which]
        if one.is_leftover:
            return
        before = bits([one.param, one.optimizer.state_dict()])
        steps = len(one.seen)
        skipped = self.scaler.step(one.optimizer)
        assert skipped is ((self.looks or one.checked) and one.overflows)
        self.check(one)
        if skipped:
            assert len(one.seen) == steps
            assert bits([one.param, one.optimizer.state_dict()]) == before
        else:
            self.same(one.seen[-1], one.meant)
        one.checked, one.is_leftover = False, True
        if then != "keep":
            self.drop(which, to_none=then == "drop")

    @rule(which=WHICH)
    def drop(self, which, to_none=True):
        one = self.sides[which]
        one.optimizer.zero_grad(set_to_none=to_none)
        one.meant = None if to_none or one.param.grad is None else 0.0
        one.is_leftover = False

    @rule()
    def update(self):
        self.scaler.update(self.optimizers)
        if self.found and self.scaler.is_active and not self.model.options.is_static:
            self.model.batch(any(self.found))
        self.found = []

    @rule(
        slopes=st.lists(st.sampled_from([None, *SLOPES, math.inf]), min_size=3, max_size=3),
        stepping=st.lists(WHICH, max_size=3),
        late=st.lists(WHICH, max_size=2),
    )
    def batch(self, slopes, stepping, late=()):
        """Most of what a training does: some backwards, some steps in any order, and the scale may change."""
        for which, slope in enumerate(slopes):
            if slope is not None:
                self.backward(which, slope)
        for which in stepping:
            self.step(which, "drop")
        for which in late:
            self.backward(which, 1.0)
        self.update()

    @rule(options=scalings(), overflows=st.lists(st.booleans(), min_size=4, max_size=9))
    def run(self, options, overflows):
        """A training of one optimizer while the others wait."""
        self.configure(options)
        for number, overflow in enumerate(overflows):
            self.batch([math.inf if overflow else 1.0, None if number else 0.25, None], [0])

    @rule(scale=st.sampled_from([0.3, 2.0, 96.0, 2.0**20]))
    def move(self, scale):
        self.update()
        if not self.scaler.is_active or self.model.options.is_static:
            with pytest.raises(ScalingError):
                self.scaler.move_to(scale, self.optimizers)
            return
        self.scaler.move_to(scale, self.optimizers)
        self.model.start(self.model.bounded(scale))

    @rule(options=scalings() | st.none())
    def configure(self, options):
        self.update()
        self.scaler.configure(options, self.optimizers)
        was, self.model.options = self.model.options, options
        if options != was:
            self.model.start(
                1.0 if options is None else self.model.bounded(self.model.now) if was else options.init_scale
            )

    @rule(fresh=st.booleans())
    def save_and_load(self, fresh):
        self.update()
        state = self.scaler.state_dict()
        assert (fp32(state["scale"]), state["growth_tracker"]) == (self.model.now, self.model.good)
        if self.model.options is not None and self.model.options.hysteresis > 1:
            assert state["overflows"] == self.model.overflows
        if fresh and not any(one.checked for one in self.sides):
            self.scaler = LossScaler(self.model.options, guards=self.scaler.guards)
        self.scaler.load_state_dict(state)

    def same(self, grad, meant):
        if meant is None:
            assert grad is None
        else:
            wanted = torch.full((2,), meant)
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=0, equal_nan=True)

    @invariant()
    def the_scale_is_the_rules(self):
        if not hasattr(self, "scaler"):
            return
        scale = fp32(self.scaler.get_scale())
        assert scale == self.model.now
        assert 0 < scale < math.inf
        if self.model.options is not None:
            assert fp32(self.model.options.min_scale) <= scale <= fp32(self.model.options.max_scale)


ScalerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=20)
TestLossScaler = ScalerMachine.TestCase


def alone():
    param = torch.nn.Parameter(torch.zeros(2))
    return LossScaler(LossScaling(init_scale=1024.0, growth_interval=1)), param, torch.optim.SGD([param], lr=1.0)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_gradient_that_comes_after_its_optimizers_step_follows_the_scale(to_none):
    scaler, param, optimizer = alone()
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=to_none)
    scaler.scale(param.sum()).backward()
    scaler.update([optimizer])
    assert scaler.get_scale() == 2048
    scaler.unscale_(optimizer)
    assert param.grad.tolist() == [1, 1]


def test_a_gradient_that_was_stepped_on_and_kept_is_left_alone():
    scaler, param, optimizer = alone()
    other = torch.nn.Parameter(torch.zeros(2))
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    scaler.scale(other.sum()).backward()
    scaler.update([optimizer, torch.optim.SGD([other], lr=1.0)])
    assert param.grad.tolist() == [1, 1]
    assert other.grad.tolist() == [2048, 2048]


def test_a_gradient_that_was_clipped_and_not_stepped_survives_other_options():
    scaler, param, optimizer = alone()
    scaler.scale(param.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.update([optimizer])
    scaler.configure(LossScaling(init_scale=64.0, max_scale=128.0), [optimizer])
    scaler.scale(param.sum()).backward()
    scaler.unscale_(optimizer)
    assert param.grad.tolist() == [2, 2]
