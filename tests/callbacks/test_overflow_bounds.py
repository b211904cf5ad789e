"""Diagnosing is bounded, and nothing that goes wrong with it ends a run."""

import json
import math
import warnings

import pytest
import torch
from diary import Diary
from known_results import Batches, stock, trainer_of
from lightnings import CSVLogger
from monitor_models import Spike, Watched, batches, mlp, watch
from plugin_models import one_line
from torch import nn

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision
from lightning_mixprec.evidence.replay import StepReplay


def rows_of(logger):
    with open(f"{logger.log_dir}/mixprec.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert len({row.pop("run_id") for row in rows}) <= 1
    return rows


class Sparse(Watched):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch.to_dense() * math.inf, batch_idx)


def test_a_sparse_batch_ends_no_run():
    seen = watch(Sparse(mlp(None)), values=[each.to_sparse() for each in batches()])
    assert [event["verdict"] for event in seen.events] == ["model"]


@pytest.fixture
def logger(tmp_path):
    return CSVLogger(tmp_path, name="run", version=0)


def test_no_more_than_the_given_number_of_failed_steps_is_replayed(monkeypatch):
    replays = []
    run = StepReplay.run_on_own
    monkeypatch.setattr(StepReplay, "run_on_own", lambda self, *a, **k: replays.append(a[2]) or run(self, *a, **k))
    seen = watch(Watched(mlp("forward")), values=batches(5), monitor=OverflowMonitor(max_diagnoses=2))
    assert [event["batch_idx"] for event in seen.events] == [0, 1]
    assert set(replays) == {0, 1}
    assert len(replays) <= 2 * 9
    assert seen.monitor.reasons == {"precision": 2, "unknown": 3}
    assert seen.skipped_steps == 5


def test_the_same_culprit_is_warned_of_once():
    assert len(watch(Watched(mlp("forward")), values=batches(5)).warned) == 1


class Hungry(nn.Module):
    """Identity that has too little memory for large batches."""

    def __init__(self, most, message="CUDA out of memory."):
        super().__init__()
        self.most, self.error = most, torch.OutOfMemoryError(message)
        self.sizes = []

    def forward(self, x):
        _SIZES.append(len(x))
        if len(_SIZES) > 1 and len(x) > self.most:
            raise self.error
        return x


_SIZES = Diary()


@pytest.fixture
def sizes():
    _SIZES.clear()
    return _SIZES


def hungry(most, message="CUDA out of memory."):
    return Watched(nn.Sequential(Hungry(most, message), nn.Linear(8, 8), Spike(), nn.Linear(8, 4)))


def test_a_replay_that_runs_out_of_memory_is_done_on_half_of_the_batch(sizes, logger):
    seen = watch(hungry(most=2), logger=logger)
    (event,) = seen.events
    assert (event["verdict"], event["layer"], event["direction"]) == ("precision", "net.2", "forward")
    assert event["detail"] == "on half of the batch, as memory ran out"
    assert sizes[:3] == [4, 4, 2]
    assert set(sizes[2:]) == {2}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ZeroDivisionError("none left")])
def test_a_replay_that_fails_for_good_is_a_row_and_one_warning(error, sizes, logger):
    model = hungry(most=0)
    model.net[0].error = error
    seen = watch(model, None, batches(1), logger=logger)
    said = f"{type(error).__name__}: {error}"
    assert seen.warned == [f"step 0 failed and could not be replayed ({said})."]
    assert rows_of(logger) == [
        {"monitor": "overflow", "step": 0, "epoch": 0, "batch_idx": 0, "problem": said},
    ]
    assert (seen.events, seen.monitor.reasons, seen.skipped_steps) == ([], {"unknown": 1}, 1)
    assert sizes == ([4, 4, 2] if isinstance(error, torch.OutOfMemoryError) else [4, 4])


class OnlyOnce(Watched):
    """Its training_step works once for each batch."""

    def __init__(self, net):
        super().__init__(net)
        self.done = set()

    def training_step(self, batch, batch_idx):
        if batch_idx in _DONE:
            raise RuntimeError("this batch was had\nbefore")
        _DONE.add(batch_idx)
        return super().training_step(batch, batch_idx)


_DONE = set()


def test_a_training_step_that_cannot_be_repeated_is_counted_and_warned_of_once(logger):
    _DONE.clear()
    seen = watch(OnlyOnce(mlp("forward")), values=batches(3), logger=logger)
    assert seen.warned == ["step 0 failed and could not be replayed (RuntimeError: this batch was had)."]
    assert len(rows_of(logger)) == 3
    assert (seen.skipped_steps, seen.monitor.reasons) == (3, {"unknown": 3})


@pytest.mark.filterwarnings("ignore:Found .dataloader_iter. argument")
@pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor")
def test_a_step_that_takes_an_iterator_is_counted_without_a_diagnosis():
    class Iterating(Watched):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.net(batch).float().square().mean()

    monitor = OverflowMonitor()
    trainer = trainer_of(PerLayerPrecision("fp16"), callbacks=[monitor])
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*mixprec.*|step .*")
        trainer.fit(Iterating(mlp("forward")), Batches(batches(3)))
    assert len(caught) <= 1
    assert (monitor.events, monitor.skipped_steps, monitor.reasons) == ([], 3, {"unknown": 3})


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_without_a_loss_is_not_accused():
    class Picky(Watched):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    values = batches(3)
    values[0] = values[0] * float("nan")
    seen = watch(Picky(mlp(None), weight=1.0), PerLayerPrecision("bf16"), values)
    assert (seen.events, seen.skipped_steps) == ([], 0)


@pytest.mark.parametrize(
    "arguments",
    [{"save_batch": 1}, {"save_batch": "yes"}, {"window": 0}, {"window": 1.5}, {"max_diagnoses": True}],
    ids=str,
)
def test_a_malformed_argument_is_refused_in_one_line(arguments):
    with pytest.raises(MixPrecError) as caught:
        OverflowMonitor(**arguments)
    ((name, value),) = arguments.items()
    assert f"OverflowMonitor({name}=...) is {value!r}" in one_line(caught)


@pytest.mark.filterwarnings("ignore:step 1")
def test_once_the_weights_are_lost_steps_are_only_counted(capsys):
    class Lost(Watched):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch * float("nan") if batch_idx == 1 else batch, batch_idx)

    monitor = OverflowMonitor()
    watch(Lost(mlp(None)), stock("bf16-mixed"), batches(6), monitor)
    assert [event["verdict"] for event in monitor.events][1:] == ["model"]
    assert monitor.events[1]["detail"].startswith("weights that are not finite")
    assert monitor.reasons == {"model": 5}
    shown = capsys.readouterr().out
    assert shown.index(" 1    model") < shown.index(" 2    model")
