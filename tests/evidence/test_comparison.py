"""One comparer for monitors and controller: what the gap of losses is, and that both are told the same numbers."""

import math

import pytest
import torch
from adaptive_models import Lessons, silent
from plugin_models import Call, fit, ours

from lightning_mixprec.evidence.comparison import Comparison, Wanted, is_finite
from lightning_mixprec.evidence.instruments.noise import NO_LOSS, loss_gap
from lightning_mixprec.evidence.replay import Replayed
from lightning_mixprec.evidence.run_formats import PluginFormats
from lightning_mixprec.evidence.sampled_step import SampledStep
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.evidence.trials import Trials

INF, NAN = math.inf, math.nan
GAPS = {
    "the largest of several": ([1.1, 3.0], [1.0, 2.0], 0.5),
    "both are zero": ([0.0], [0.0], 0.0),
    "fp32's is zero": ([1e-9], [0.0], INF),
    "not finite": ([NAN], [1.0], INF),
    "not finite in fp32 either": ([INF], [INF], INF),
    "no loss": ([], [], NO_LOSS),
    "no loss in fp32": ([1.0], [], NO_LOSS),
    "a loss in fp32 alone": ([], [1.0], INF),
    "another number of losses": ([1.0, 1.0], [1.0], INF),
}


@pytest.mark.parametrize(("low", "reference", "gap"), GAPS.values(), ids=GAPS)
def test_the_gap_of_losses_where(low, reference, gap):
    found = loss_gap([torch.tensor(each) for each in low], [torch.tensor(each) for each in reference])
    assert found.item() == pytest.approx(gap)


def test_a_loss_of_next_to_nothing_counts_as_larger_than_it_is_where_that_is_asked_for():
    low, reference = [torch.tensor(2e-6)], [torch.tensor(1e-6)]
    assert loss_gap(low, reference).item() == pytest.approx(1.0)
    assert loss_gap(low, reference, least=1e-3).item() == pytest.approx(1e-3)


def test_a_sparse_gradient_whose_parts_sum_to_infinity_is_not_finite():
    twice = torch.sparse_coo_tensor([[1, 1]], torch.tensor([6e4, 6e4], dtype=torch.float16), (3,))
    assert not is_finite(Replayed([], {"weight": twice}))
    assert is_finite(Replayed([], {"weight": twice / 2}))


def both(model, plugin, batch, max_bytes):
    """What the controller and what a monitor is told of a step, as it is and as it was tried."""
    wanted = Wanted(statistics=True, agreement=True, layers=("net.body",), max_bytes=max_bytes)
    comparison = Comparison(model, PluginFormats(plugin), KeptBatch(batch, 0, None), wanted)
    trials = Trials(comparison, plugin, lambda promoted: plugin.policy)
    scale, place = plugin.scaler.get_scale(), {"step": 0, "epoch": 0, "batch_idx": 0}
    told = trials.run_as_is(scale), trials.run({}, scale), trials.statistics(scale, wanted.layers)
    return told, SampledStep(model, PluginFormats(plugin), batch, place, wanted).findings()


@pytest.fixture(params=[2**20, 1], ids=["room for outputs", "no room"])
def told(request):
    found = []

    def ask(run, model):
        found.append(both(model, run.precision_plugin, next(iter(run.train_dataloader)), request.param))

    fit(silent(), ours("fp16"), Lessons(2), callbacks=[Call("on_train_batch_start", ask, at=1)])
    return (*found[0], request.param > 1)


def test_a_monitor_and_the_controller_are_told_the_same_of_a_step(told):
    (as_is, tried, statistics), found, has_room = told
    assert as_is == tried == found.agreement
    assert found.agreement.loss_gap > 0
    assert found.agreement.cosines.keys() == {"net.body", "net.head"}
    for kind in ("outputs", "gradients", "weights"):
        ours, theirs = getattr(statistics, kind), getattr(found, kind)
        assert ours.keys() == theirs.keys() != set()
        assert all(torch.equal(ours[layer].counts, theirs[layer].counts) for layer in ours)
    assert statistics.sqnr_db == found.sqnr_db
    assert set(found.sqnr_db) == ({"net.body"} if has_room else set())
    assert found.too_large == ([] if has_room else ["net.body"])


def test_statistics_for_which_memory_runs_out_end_no_run_and_tell_nothing(monkeypatch):
    def too_large(comparison):
        raise torch.OutOfMemoryError("out of memory")

    told = []

    def ask(run, model):
        plugin, kept = run.precision_plugin, KeptBatch(next(iter(run.train_dataloader)), 0, None)
        trials = Trials(
            Comparison(model, PluginFormats(plugin), kept, Wanted(statistics=True)), plugin, lambda _: plugin
        )
        told.append((trials.statistics(plugin.scaler.get_scale(), ("net.body",)), trials.problem))

    monkeypatch.setattr(Comparison, "_counted", too_large)
    fit(silent(), ours("fp16"), Lessons(2), callbacks=[Call("on_train_batch_start", ask, at=1)])
    [(found, problem)] = told
    assert not found.is_any
    assert (found.outputs, found.weights, found.sqnr_db) == ({}, {}, {})
    assert problem == "OutOfMemoryError: out of memory"
