"""The adaptive controller without a Trainer: pure-Python worlds in which it is known what each layer needs."""

import json
import math
import random
from dataclasses import dataclass, field

import pytest

from lightning_mixprec.planning.agreement import Agreement, LayerAgreement, Limits
from lightning_mixprec.planning.controller import Controller
from lightning_mixprec.planning.controller_state import Options
from lightning_mixprec.planning.promotions import Promotion
from lightning_mixprec.planning.remedies import Candidate


@dataclass
class World:
    """A model in which some layers overflow in fp16 (range) and some round too coarsely in all 16 bits (precision).

    A layer may need its needs from one batch on (begins) and no longer from another one on (ends). A ``loud`` range
    failure is a loss that is not finite, others only spoil the gradients.
    """

    needs: dict[str, str] = field(default_factory=dict)
    is_loud: bool = True
    begins: int = 1
    ends: int = 10**9
    names: tuple[str, ...] = tuple("abcdefgh")
    flops: dict[str, int] = field(default_factory=dict)
    default: str = "fp16"
    trials: int = 0

    def lacks(self, promoted, batch):
        if not self.begins <= batch < self.ends:
            return []
        formats = {name: promoted[name].compute if name in promoted else self.default for name in self.names}
        enough = {"range": ("bf16", "fp32"), "precision": ("fp32",)}
        return [name for name, kind in self.needs.items() if formats[name] not in enough[kind]]

    def agreement(self, promoted, batch):
        lacking = self.lacks(promoted, batch)
        is_finite = not (self.is_loud and any(self.needs[name] == "range" for name in lacking))
        cosine = 0.5 if lacking else 0.9999
        layers = {name: LayerAgreement(cosine, 1.0, 1.0) for name in self.names}
        return Agreement(is_finite, 0.9 if lacking else 1e-4, layers)

    def controller(self, pinned=(), **options):
        layers = [Candidate(name, self.default, self.flops.get(name, 10), name in pinned) for name in self.names]
        return Controller(layers, Options(**options))

    def batch(self, controller):
        """One batch, as the callback plays it; the decisions, each with its batch."""
        number = controller.counts.batches + 1
        decisions = []

        def attempt(promoted, scale):
            self.trials += 1
            return self.agreement(promoted, number)

        if controller.begin_batch():
            present = attempt(controller.promoted, 1024.0)
            decisions.append(controller.decide_on_sample(present, 1024.0, attempt))
        is_finite = self.agreement(controller.promoted, number).is_finite
        if controller.see_step(skipped=not is_finite, loss_is_bad=not is_finite) and controller.accuse():
            culprit = self.lacks(controller.promoted, number)[:1]
            decisions.append(controller.decide_on_failure(culprit, 1024.0, attempt, {"layer": culprit[0]}))
        return [(number, decision) for decision in decisions if decision is not None]

    def run(self, controller, batches):
        return [each for _ in range(batches) for each in self.batch(controller)]


def test_a_healthy_run_is_left_alone_and_hardly_looked_at():
    world = World()
    controller = world.controller()
    assert world.run(controller, 10_000) == []
    assert world.trials == 5 + 9, "a sample at batches 1, 10, 30, 100, 300 after the first step, then every 1000"


def test_a_loud_range_failure_is_moved_to_bf16_at_its_second_occurrence():
    world = World({"c": "range"})
    controller = world.controller()
    [(batch, decision)] = world.run(controller, 500)
    assert batch == 2
    assert decision.kind == "promote"
    assert decision.moves == (("c", "fp16", "bf16"),)
    assert decision.evidence["layer"] == "c"
    assert decision.reason == "overflow"


def test_without_bf16_it_is_moved_to_fp32():
    world = World({"c": "range"})
    [(_, decision)] = world.run(world.controller(has_bf16=False), 100)
    assert decision.moves == (("c", "fp16", "fp32"),)


def test_one_bad_batch_moves_nothing():
    world = World({"c": "range"}, begins=50, ends=51)
    assert world.run(world.controller(), 1000) == []


def test_a_silent_range_failure_is_found_by_a_sample_and_moved_to_bf16():
    world = World({"f": "range"}, is_loud=False)
    [(batch, decision)] = world.run(world.controller(), 1000)
    assert batch == 3, "the sample after the first step, and one that confirms it"
    assert decision.moves == (("f", "fp16", "bf16"),)


def test_a_precision_failure_is_moved_to_fp32_never_to_bf16():
    world = World({"f": "precision"}, is_loud=False)
    [(_, decision)] = world.run(world.controller(), 1000)
    assert decision.moves == (("f", "fp16", "fp32"),)


def test_both_kinds_at_once():
    world = World({"b": "range", "g": "precision", "h": "range"}, is_loud=False)
    decisions = world.run(world.controller(), 1000)
    promoted = {name: Promotion.from_text(text).compute for name, text in decisions[-1][1].promoted.items()}
    assert promoted == {"b": "bf16", "g": "fp32", "h": "bf16"}
    assert len(decisions) == 1


def test_a_failure_that_begins_late_is_found():
    world = World({"f": "precision"}, is_loud=False, begins=150)
    [(batch, _)] = world.run(world.controller(), 1000)
    assert batch == 302


def test_a_uniform_bf16_run_is_promoted_to_fp32():
    world = World({"f": "precision"}, is_loud=False, default="bf16")
    [(_, decision)] = world.run(world.controller(), 1000)
    assert decision.moves == (("f", "bf16", "fp32"),)


def test_pinned_layers_stay():
    world = World({"c": "range"})
    controller = world.controller(pinned=("c",))
    assert world.run(controller, 300) == []


def test_looking_in_vain_costs_less_and_less():
    world = World({"c": "range"})
    controller = world.controller(pinned=("c",))
    world.run(controller, 2000)
    looks = world.trials / (8 + 1)
    assert looks < 60


def test_the_share_of_16_bits_is_kept():
    world = World({"c": "precision"}, is_loud=False, flops={"c": 1000})
    assert world.run(world.controller(min_low_precision_share=0.5), 1000) == []
    [(_, decision)] = world.run(world.controller(min_low_precision_share=0.05), 1000)
    assert decision.moves == (("c", "fp16", "fp32"),)


def test_a_move_that_a_bound_forbids_is_told():
    world = World({"c": "precision"}, is_loud=False, flops={"c": 1000})
    controller = world.controller(min_low_precision_share=0.5)
    assert world.run(controller, 1000) == []
    refused = controller.take_refused()
    assert refused.moves == (("c", "fp16", "fp32"),) and refused.bound == ("min_low_precision_share", 0.5)
    assert refused.low_precision_share == 70 / 1070
    assert controller.take_refused() is None


def test_a_share_above_what_the_policy_has_is_a_share_of_that():
    world = World({"c": "precision"}, is_loud=False, flops={"a": 1000, "b": 60, "c": 10})
    controller = world.controller(min_low_precision_share=0.5)
    controller.rebase({**{name: layer.format for name, layer in controller.layers.items()}, "a": "fp32"})
    assert controller.low_share() < 0.5
    [(_, decision)] = world.run(controller, 1000)
    assert decision.moves == (("c", "fp16", "fp32"),)
    world.needs = {"b": "precision"}
    assert world.run(controller, 1000) == [] and controller.take_refused().moves == (("b", "fp16", "fp32"),)


def test_the_number_of_assignments_is_bounded():
    world = World(dict.fromkeys("abcdef", "range"))
    controller = world.controller(max_assignments=3)
    for name in "abcdef":
        world.needs = {name: "range"}
        world.run(controller, 20)
    assert len(controller.assignments) == 3


def test_trials_are_bounded():
    names = tuple(f"layer{number}" for number in range(200))
    world = World(dict.fromkeys(random.Random(0).sample(names, 30), "precision"), is_loud=False, names=names)
    controller = world.controller(max_trials=20)
    for _ in range(3):
        world.batch(controller)
    assert world.trials <= 2 + 20


def test_what_has_passed_is_demoted_again_and_what_comes_back_waits_longer():
    world = World({"c": "range"}, ends=500)
    controller = world.controller(dwell_steps=1000)
    (_, promotion), (batch, demotion) = world.run(controller, 5000)
    assert promotion.kind == "promote"
    assert (demotion.kind, demotion.moves, demotion.promoted) == ("demote", (("c", "bf16", "fp16"),), {})
    assert 1000 < batch <= 2200
    world.begins, world.ends = controller.counts.batches + 1, controller.counts.batches + 50
    begins = controller.counts.batches
    (again, relapse), (back, _) = world.run(controller, 12_000)
    assert relapse.moves == (("c", "fp16", "bf16"),)
    assert again <= begins + 2
    assert back - again > 4000


def test_what_still_fails_stays_promoted():
    world = World({"c": "range"})
    decisions = world.run(world.controller(dwell_steps=200, every_n_steps=100), 5000)
    assert len(decisions) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_resumed_controller_decides_as_one_that_was_not_interrupted(seed):
    source = random.Random(seed)
    kinds = dict.fromkeys(source.sample("abcdefgh", 2), source.choice(["range", "precision"]))
    is_loud, begins = source.random() < 0.5, source.randint(1, 60)
    options = {"every_n_steps": 50, "dwell_steps": 60}

    def world():
        return World(kinds, is_loud=is_loud, begins=begins, ends=begins + 200)

    whole = world().run(world().controller(**options), 600)
    cut = source.randint(1, 599)
    first = world().controller(**options)
    before = world().run(first, cut)
    second = world().controller(**options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + world().run(second, 600 - cut) == whole


class Pinned:
    """Two branches whose gradients lie 2**40 apart: ``big`` layers overflow above a scale, ``small`` vanish below."""

    names = ("big1", "big2", "small1", "small2", "trunk", "loss")

    def __init__(self, large=2.0**4, least=2.0**20, spared=()):
        self.large, self.least, self.spared = large, least, spared

    def attempt(self, promoted, scale):
        overflows = any(promoted.get(name) is None for name in ("big1", "big2")) and scale > self.large
        layers = {}
        for name in self.names:
            vanishes = name.startswith("small") and scale < self.least and promoted.get(name) is None
            layers[name] = LayerAgreement(0.0, 0.0, 0.0) if vanishes else LayerAgreement(1.0, 1.0, 1.0)
        return Agreement(not overflows, 0.0, layers)

    def decide(self, scale, flops=None):
        flops = flops or dict.fromkeys(self.names, 10)
        controller = Controller([Candidate(name, "fp16", flops[name]) for name in self.names], Options())
        controller.begin_batch()
        controller.see_step(skipped=False, loss_is_bad=False)
        for _ in range(2):
            controller.begin_batch()
            decision = controller.decide_on_sample(self.attempt({}, scale), scale, self.attempt)
        return decision


def test_vanishing_gradients_that_a_larger_scale_brings_back_move_no_layer():
    decision = Pinned(large=2.0**40).decide(2.0**16)
    assert (decision.kind, decision.moves, decision.scale) == ("scale", (), 2.0**20)


def test_a_pinned_scale_moves_one_of_the_branches_and_not_both():
    decision = Pinned().decide(2.0**4)
    moved = {name for name, _, _ in decision.moves}
    assert moved in ({"big1", "big2"}, {"small1", "small2"})
    assert (decision.scale is None) == (moved == {"small1", "small2"})


def test_a_pinning_layer_moves_and_the_others_get_their_scale_back():
    world = Pinned()
    world.names = ("big1", "big2", "small1", "small2", "small3", "loss")
    decision = world.decide(2.0**4)
    assert {name for name, _, _ in decision.moves} == {"big1", "big2"}
    assert decision.scale == 2.0**20


def test_a_gradient_that_is_nothing_but_rounding_is_no_evidence():
    noise = LayerAgreement(cosine=0.01, ratio=5000.0, size=1e-6)
    healthy = LayerAgreement(1.0, 1.0, 1.0)
    assert Limits().accepts(Agreement(True, 0.0, {"bias": noise, "layer": healthy}))
    assert Limits().failing(Agreement(True, 0.0, {"bias": noise._replace(size=0.5), "layer": healthy})) == ["bias"]


def test_what_would_have_no_room_to_spare_is_not_taken_back():
    world = World({"c": "range"}, ends=500)
    controller = world.controller(dwell_steps=200, every_n_steps=100)
    world.run(controller, 600)
    assert controller.promoted == {"c": Promotion("bf16", "input")}
    asked = []
    for _ in range(3):
        controller.counts.batches += 300
        controller.begin_batch()
        controller.decide_on_sample(
            world.agreement(controller.promoted, 1000),
            1024.0,
            lambda promoted, scale: world.agreement(promoted, 1000),
            lambda formats: asked.append(dict(formats)) or False,
        )
    assert asked == [{"c": "fp16"}] * 3
    assert controller.promoted == {"c": Promotion("bf16", "input")}


def test_the_low_share_weighs_layers_by_their_flops():
    world = World(names=tuple("abc"), flops={"a": 6, "b": 1, "c": 1})
    controller = world.controller()
    assert controller.low_share() == 1.0
    assert controller.low_share({"b": Promotion("fp32"), "c": Promotion("bf16", "fp32")}) == 7 / 8
    controller.measured({})
    assert math.isnan(controller.low_share())


def test_an_accused_part_that_never_runs_by_itself_is_looked_for_elsewhere():
    world = World({"c": "range"})
    controller = world.controller()
    controller.begin_batch()
    attempt = lambda promoted, scale: world.agreement(promoted, 1)  # noqa: E731
    decision = controller.decide_on_failure(["c.out_proj", "c", ""], 1024.0, attempt, {})
    assert decision.moves == (("c", "fp16", "bf16"),)
