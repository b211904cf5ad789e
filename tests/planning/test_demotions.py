"""Demotions without a Trainer: pure-Python worlds in which it is known what each layer can bear."""

import json
from dataclasses import dataclass, field

import pytest

from lightning_mixprec.planning.agreement import Agreement, LayerAgreement
from lightning_mixprec.planning.controller_state import Options
from lightning_mixprec.planning.demotions import DemotingController, Target
from lightning_mixprec.planning.remedies import Candidate


@dataclass
class World:
    """Layers of an fp32 policy, some of which cannot bear a format, from the first batch or from a later one on."""

    cannot: dict[str, str] = field(default_factory=dict)
    since: int = 0
    names: tuple[str, ...] = tuple("abcdefgh")
    base: str = "fp32"
    tried: list[frozenset[str]] = field(default_factory=list)

    def agreement(self, in_force, batch):
        bad = [n for n, format in self.cannot.items() if n in in_force and in_force[n].compute == format]
        is_off = bool(bad) and batch >= self.since
        layers = {name: LayerAgreement(0.5 if is_off else 0.9999, 1.0, 1.0) for name in self.names}
        return Agreement(True, 0.9 if is_off else 1e-4, layers)

    def controller(self, targets, pinned=(), **options):
        layers = [Candidate(name, self.base, 10, name in pinned) for name in self.names]
        return DemotingController(layers, Options(**{"min_low_precision_share": 0.5, **options}), targets)

    def run(self, controller, batches):
        decisions = []
        for _ in range(batches):
            number = controller.counts.batches + 1

            def attempt(promoted, scale, number=number):
                self.tried.append(frozenset(promoted))
                return self.agreement(promoted, number)

            if controller.begin_batch():
                present = self.agreement(controller.in_force, number)
                if (found := controller.decide_on_sample(present, 1.0, attempt)) is not None:
                    decisions.append((number, found))
            controller.see_step(skipped=False, loss_is_bad=False)
        return decisions


def targets(chosen="abcdefgh", rest="", format="bf16", layers=1):
    """A target for each letter, the safest first."""
    found = [Target((name,), format, 1e-9 * (place + 1), True) for place, name in enumerate(chosen)]
    return found + [Target((name,), format, 1e-9 * (place + 1), False) for place, name in enumerate(rest)]


def in_force(controller):
    return {name: promotion.compute for name, promotion in controller.in_force.items()}


def test_a_wide_policy_finds_the_plans_form_the_safest_layers_first():
    world = World()
    controller = world.controller(targets())
    decisions = world.run(controller, 3000)
    assert in_force(controller) == dict.fromkeys("abcdefgh", "bf16")
    assert [[move[0] for move in each.moves] for _, each in decisions] == [list("abcd"), list("ef"), ["g"], ["h"]]
    assert {each.kind for _, each in decisions} == {"demote"}
    assert all(move[1:] == ("fp32", "bf16") for _, each in decisions for move in each.moves)
    assert controller.low_share() == 1.0
    tries = len(world.tried)
    world.run(controller, 10_000)
    assert len(world.tried) == tries, "when all is done nothing is tried any more"


def test_nothing_moves_that_fails_its_trial_and_what_fails_alone_is_left_alone():
    world = World(cannot={"c": "bf16"})
    controller = world.controller(targets())
    world.run(controller, 5000)
    assert in_force(controller) == dict.fromkeys("abdefgh", "bf16")
    assert controller.demotions.refused == ["c"]
    assert len([tried for tried in world.tried if "c" in tried]) <= 4, "halving finds it"


def test_each_move_was_tried_twice_before():
    world = World()
    controller = world.controller(targets("ab"))
    decisions = world.run(controller, 300)
    before = set()
    for _, each in decisions:
        before |= {move[0] for move in each.moves}
        assert world.tried.count(frozenset(before)) == 2


def test_at_the_first_relapse_the_smallest_set_goes_back_and_stays():
    world = World(cannot={"b": "bf16"}, since=1500)
    controller = world.controller(targets())
    decisions = world.run(controller, 6000)
    (number, back), *others = [each for each in decisions if each[1].kind == "promote"]
    assert back.moves == (("b", "bf16", "fp32"),)
    assert "differ from fp32's, and agrees without what the plan narrowed" in back.reason
    assert 1500 <= number <= 2600
    assert others == []
    assert in_force(controller) == dict.fromkeys("acdefgh", "bf16")
    assert "b" not in back.promoted


def test_a_failed_step_takes_back_before_anything_is_promoted():
    world = World(cannot={"b": "bf16"}, since=1500)
    controller = world.controller(targets())
    world.run(controller, 1000)
    number = 1501
    back = controller.decide_on_failure(["a"], 1.0, lambda p, scale: world.agreement(p, number), {"layer": "a"})
    assert back.moves == (("b", "bf16", "fp32"),)
    assert back.evidence["layer"] == "a"
    assert controller.promoted == {}


def test_what_the_plan_left_wide_follows_until_the_share_is_reached():
    world = World()
    controller = world.controller(targets("ab", "cdefgh"), min_low_precision_share=0.5)
    world.run(controller, 5000)
    assert sorted(in_force(controller)) == list("abcd")
    assert controller.low_share() == 0.5
    alone = world.controller(targets("ab", "cdefgh"), min_low_precision_share=None)
    world.run(alone, 5000)
    assert sorted(in_force(alone)) == list("ab")


def test_pinned_layers_and_no_more_assignments_than_allowed():
    world = World()
    controller = world.controller(targets(), pinned=("a", "h"), max_assignments=3)
    decisions = world.run(controller, 5000)
    assert len(decisions) == 2
    assert sorted(in_force(controller)) == list("bcdefg"), "the last assignment that may be had takes all that is left"


def test_layers_that_move_together_are_never_parted():
    world = World(cannot={"b": "bf16"}, since=1200)
    pairs = [Target(("a", "b"), "bf16", 1e-9, True), Target(("c", "d"), "bf16", 2e-9, True)]
    controller = world.controller(pairs)
    decisions = world.run(controller, 4000)
    for _, each in decisions:
        moved = {move[0] for move in each.moves}
        assert moved in ({"a", "b"}, {"c", "d"}), moved
    assert sorted(in_force(controller)) == list("cd")


def test_a_bf16_policy_goes_to_eight_bits_where_the_plan_does():
    world = World(base="bf16", cannot={"d": "fp8"})
    controller = world.controller(targets("abcd", format="fp8"))
    world.run(controller, 5000)
    assert in_force(controller) == dict.fromkeys("abc", "fp8")


def test_fp16_needs_a_loss_scale_that_moves():
    world = World()
    without, with_one = world.controller(targets(format="fp16"), scales=None), world.controller(targets(format="fp16"))
    world.run(without, 3000)
    world.run(with_one, 3000)
    assert in_force(without) == {}
    assert in_force(with_one) == dict.fromkeys("abcdefgh", "fp16")


def test_what_is_no_narrower_than_the_policy_is_nothing():
    world = World(base="bf16")
    controller = world.controller(targets())
    assert world.run(controller, 3000) == []
    assert not world.tried


def test_another_policy_to_start_from_ends_what_is_no_narrower():
    world = World()
    controller = world.controller(targets("ab"))
    world.run(controller, 500)
    controller.rebase({name: "bf16" if name == "a" else "fp32" for name in world.names})
    assert in_force(controller) == {"b": "bf16"}


@pytest.mark.parametrize("stop", [1, 11, 12, 150, 900, 1600, 2100])
def test_a_run_that_is_resumed_decides_as_one_that_was_not_interrupted(stop):
    def make():
        return World(cannot={"c": "bf16", "e": "bf16"}, since=1500)

    world, whole = make(), make().controller(targets())
    expected = make().run(whole, 4000)
    first = world.controller(targets())
    before = world.run(first, stop)
    state = json.loads(json.dumps({"controller": first.state_dict(), **first.further_state()}))
    second = world.controller(targets())
    second.load_further_state(state)
    second.load_state_dict(state["controller"])
    assert [*before, *world.run(second, 4000 - stop)] == expected
    assert in_force(second) == in_force(whole)
