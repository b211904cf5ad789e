"""Odd batches: each trains under a mixed policy as in fp32, and is no reason for a callback to end the run."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from misuse_models import (
    FORMATS,
    Given,
    around,
    check_healthy,
    check_unchanged_by_watching,
    every_format,
    mixed,
    pairs,
    plain_task,
    seeded,
    watched,
)
from plugin_models import Task, fit, ours, same
from torch import nn

from lightning_mixprec import PerLayerPrecision

# Kinds of batches


class Bag:
    """Knows how to move itself, which is all that Lightning asks of a batch."""

    def __init__(self, x, y):
        self.x, self.y, self.moved = x, y, 0

    def to(self, *args, **kwargs):
        moved = Bag(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))
        moved.moved = self.moved + 1
        return moved


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Fields:
    x: torch.Tensor
    y: torch.Tensor


class ByAttribute(Task):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


@pytest.mark.parametrize("kind", [Bag, Named, Fields])
@every_format
def test_batches_of_a_class_of_the_users_own(kind, format):
    batches = Given([kind(x, y) for x, y in pairs()])
    check_healthy(lambda: ByAttribute(around(nn.Tanh())), mixed(format), batches)


class Words(Task):
    """Makes its tensors itself."""

    def training_step(self, batch, batch_idx):
        x = torch.tensor([[float(len(word))] * 6 for word in batch]) / 10
        return super().training_step((x, torch.ones(len(batch), 2)), batch_idx)


@pytest.mark.parametrize(
    "batches", [[["a", "bb"], ["ccc", "d"]], [{"a", "bb"}], [("a",)] * 3], ids=["lists", "a set", "tuples"]
)
@every_format
def test_batches_without_tensors(batches, format):
    check_healthy(lambda: Words(around(nn.Tanh())), mixed(format), Given(batches))


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@every_format
def test_batches_that_are_none_are_passed_over(format):
    first, *rest = pairs()
    run = check_healthy(plain_task, mixed(format), Given([first, None, *rest]))
    assert run.trainer.global_step == 4


class Eating(Task):
    """Takes its batch apart while it works."""

    def training_step(self, batch, batch_idx):
        x, y = batch.pop("x"), batch.pop("y")
        x.mul_(0.5)
        return super().training_step((x, y), batch_idx)


@every_format
def test_a_step_that_takes_its_batch_apart(format):
    def eaten(monitor):
        model = seeded(lambda: Eating(around(nn.Tanh())))
        batches = Given([{"x": x, "y": y} for x, y in pairs()])
        return monitor(model, batches)

    run = eaten(lambda model, batches: watched(model, mixed(format), batches))
    plain = eaten(lambda model, batches: fit(model, ours(mixed(format)), batches) and model)
    assert run.problems == []
    assert same(run.model.losses, plain.losses)


# Iterators


class FromIterator(Task):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument in the `training_step`")
@every_format
def test_a_step_that_takes_an_iterator_is_trained_and_not_sampled_and_each_callback_says_so(format):
    with pytest.warns(UserWarning, match="takes an iterator over them") as caught:
        run = check_unchanged_by_watching(lambda: FromIterator(around(nn.Tanh())), mixed(format))
    said = [str(warning.message).partition(" ")[0] for warning in caught if "over them" in str(warning.message)]
    assert sorted(said) == ["AdaptivePrecision", "FidelityMonitor", "UnderflowMonitor"]
    assert run.rows == []
    assert len(run.model.losses) == 4


# Values


def with_nan():
    batches = pairs()
    batches[1][0][0, 0] = math.nan
    return batches


def with_empty():
    batches = pairs()
    batches[1] = (torch.zeros(0, 6), torch.zeros(0, 2))
    return batches


@pytest.mark.parametrize("policy", ["fp32", *map(mixed, FORMATS)], ids=str)
def test_a_batch_with_nan_is_a_step_that_is_none_and_is_named(policy):
    with pytest.warns(UserWarning, match="step 1, batch 1: the batch itself is not finite"):
        run = watched(seeded(plain_task), policy, Given(with_nan()))
    without = seeded(plain_task)
    fit(without, ours(policy), Given([batch for place, batch in enumerate(pairs()) if place != 1]))
    assert run.plugin.skipped_steps == 1
    assert run.trainer.global_step == 3
    assert [(event["batch_idx"], event["verdict"]) for event in run.overflows] == [(1, "data")]
    assert run.plugin.history == []
    if "fp16" not in str(policy):  # there the skipped step halves the loss scale, too
        assert same(dict(run.model.state_dict()), dict(without.state_dict()))
    assert all(torch.isfinite(param).all() for param in run.model.parameters())


@pytest.mark.parametrize("policy", ["fp32", *map(mixed, FORMATS)], ids=str)
def test_a_mean_over_no_rows_is_nan_with_gradients_of_zero_and_is_named(policy):
    with pytest.warns(UserWarning, match="step 1, batch 1: the forward of .* is not finite in fp32 either"):
        run = check_unchanged_by_watching(plain_task, policy, Given(with_empty()))
    assert [(event["batch_idx"], event["verdict"]) for event in run.overflows] == [(1, "model")]
    assert run.model.losses[1].isnan()
    assert run.trainer.global_step == 4
    assert all(torch.isfinite(param).all() for param in run.model.parameters())


class Summing(Task):
    """A sum over no rows is a finite loss, and its gradient is zero."""

    def training_step(self, batch, batch_idx):
        loss = (self(batch[0]) - batch[1]).square().sum() / 8
        self.losses.append(loss.detach().clone())
        return loss


@every_format
def test_a_sum_over_no_rows_is_an_ordinary_step(format):
    run = check_healthy(lambda: Summing(around(nn.Tanh())), mixed(format), Given(with_empty()))
    assert run.trainer.global_step == 4
    assert run.model.losses[1] == 0


@every_format
def test_a_run_of_nothing_but_nan_ends_with_an_error_that_says_what_to_look_at(format):
    batches = Given([(torch.full((4, 6), math.nan), torch.zeros(4, 2))] * 4)
    model = seeded(plain_task)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="the batch itself is not finite"),
        pytest.raises(ValueError, match=r"in a row had non-finite gradients; .*look for inf or NaN in the batch"),
    ):
        watched(model, PerLayerPrecision(mixed(format), {"max_consecutive_skips": 3}), batches)
    assert same(dict(model.state_dict()), start)
