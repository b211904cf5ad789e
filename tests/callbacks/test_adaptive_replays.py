"""The price of a decision in replays: a batch is run in fp32 once, whatever is asked of it."""

import contextlib
from collections import Counter
from functools import partial

import pytest
from adaptive_models import Encoding, Lessons, Loud, Silent, adapt, encoded, loud, silent
from observed_models import monitors
from plugin_models import Call, Task

from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.evidence.replay import StepReplay


@pytest.fixture
def replays(monkeypatch):
    """By batch, how often its step was replayed: in fp32, and in all."""
    counted, in_fp32 = [Counter()], []
    opened, run = StepReplay.opened, StepReplay.run_on_own

    @contextlib.contextmanager
    def noting(self, *, reference=False, **options):
        in_fp32.append(reference)
        with opened(self, reference=reference, **options) as stand_ins:
            yield stand_ins
        in_fp32.pop()

    def counting(self, *args, **kwargs):
        counted[-1].update(["all", "fp32"] if in_fp32[-1] else ["all"])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(StepReplay, "opened", noting)
    monkeypatch.setattr(StepReplay, "run_on_own", counting)
    return counted


def prices(replays, make, batches, watching=(), **options):
    """By batch: its decision's kind, None without one, how often it was replayed in fp32, and in all."""
    adaptive, seen = AdaptivePrecision(**options), []

    def note(run, model):
        kinds = [decision["kind"] for decision in adaptive.decisions[sum(kind is not None for kind, *_ in seen) :]]
        seen.append((next(iter(kinds), None), replays[-1]["fp32"], replays[-1]["all"]))
        replays.append(Counter())

    adapt(make, adaptive, callbacks=[*watching, Call("on_train_batch_end", note)], batches=batches)
    return seen


def passing():
    """Phases in the thousands in the first batches, next to nothing from then on."""
    lessons = Lessons(40)
    inputs = [x if number < 8 else x * 1e-3 for number, (x, _) in enumerate(lessons.batches)]
    lessons.batches = [(x, Encoding()(x)[:, :2]) for x in inputs]
    return lessons


def test_a_quiet_sample_is_the_step_in_fp32_and_as_it_is(replays):
    seen = prices(replays, lambda: Task(Loud(deviation=0.3)), Lessons(12), every_n_steps=4)
    assert [price for price in seen if price[2]] == [(None, 1, 2)] * 3


def test_a_promotion_takes_one_step_in_fp32_the_trials_and_one_for_the_outputs_of_what_moves(replays):
    seen = prices(replays, silent, encoded(12))
    assert seen[:4] == [(None, 0, 0), (None, 1, 2), ("promote", 1, 13), (None, 1, 2)]


def test_a_promotion_after_a_failure_shares_the_step_in_fp32_with_its_diagnosis(replays):
    seen = prices(replays, loud, Lessons(6))
    assert seen[0] == (None, 1, 2), "a failed step that is looked into, without a decision"
    assert seen[1] == ("promote", 1, 7)


def test_a_demotion_takes_one_step_in_fp32_and_so_does_each_sample_on_the_way_to_it(replays):
    seen = prices(replays, partial(Task, Silent()), passing(), every_n_steps=2, dwell_steps=4)
    place = next(number for number, price in enumerate(seen) if price[0] == "demote")
    assert seen[place - 1 : place + 1] == [(None, 1, 3), ("demote", 1, 4)]
    assert {fp32 for _, fp32, _ in seen} <= {0, 1}


def test_monitors_share_one_reference_among_them_and_adaptive_precision_has_its_own(replays):
    seen = prices(replays, lambda: Task(Loud(deviation=0.3)), Lessons(4), monitors(), every_n_steps=1)
    assert seen[1:] == [(None, 1 + 1, 2 + 2)] * 3
