"""What is kept of a step: its batch as it came, and the random numbers it begins with, as long as steps use any."""

from collections import UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from monitor_models import Planted, Watched, watch
from torch import nn

from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.step_window import BatchUse, RandomUse

CPU = torch.device("cpu")


def kept(uses):
    """For each step, whether random numbers were recorded; ``uses`` says whether the step draws some."""
    watch, recorded = RandomUse(CPU), []
    for draws in uses:
        recorded.append(watch.begin() is not None)
        if draws:
            torch.rand(1)
        watch.end()
    return recorded


def test_steps_that_draw_are_always_recorded():
    assert kept([True] * 200) == [True] * 200


def test_steps_that_draw_none_are_looked_at_eight_times_and_then_now_and_then():
    assert [step for step, is_kept in enumerate(kept([False] * 200)) if is_kept] == [*range(8), 64, 128, 192]


@pytest.mark.parametrize("begins", [3, 70])
def test_steps_that_begin_to_draw_are_recorded_from_the_next_look_on(begins):
    recorded = kept([step >= begins for step in range(200)])
    first_look = next(step for step in (*range(8), 64, 128) if step >= begins)
    assert all(recorded[first_look:])


def test_what_is_recorded_is_what_the_step_began_with():
    watch = RandomUse(CPU)
    state = watch.begin()
    drawn = torch.rand(3)
    watch.end()
    state.restore()
    assert torch.equal(torch.rand(3), drawn)


def test_other_draws_between_steps_count_for_none():
    watch, recorded = RandomUse(CPU), []
    for _ in range(20):
        torch.rand(1)
        recorded.append(watch.begin() is not None)
        watch.end()
    assert recorded == [True] * 8 + [False] * 12


@pytest.mark.gpu
def test_draws_on_the_gpu_count():
    device = torch.device("cuda")
    before = RandomState(device, others=False)
    torch.rand(1, device=device)
    assert not before.is_same(RandomState(device, others=False))


# The batch


class Graph:
    def __init__(self, **stores):
        self._stores = stores


@dataclass
class Sample:
    x: Any
    extra: dict = field(default_factory=dict)


Pair = namedtuple("Pair", "x y")
KINDS = {
    "a dict": lambda x: {"x": x},
    "a list": lambda x: [x, 1],
    "a named tuple": lambda x: Pair({"x": x}, 1),
    "a UserDict": lambda x: UserDict(x=x),
    "a dataclass": lambda x: Sample(x, {"x": x}),
    "an object of another's class": lambda x: Graph(nodes={"x": x}),
    "objects in one another": lambda x: [Sample(UserDict(x=Graph(nodes=(x,))))],
}


def holders(value, found):
    """The containers within a value that something can be taken out of."""
    inside = value.data if isinstance(value, UserDict) else value if isinstance(value, (dict, list)) else None
    if inside is not None:
        found.append(inside)
    others = value if isinstance(value, tuple) else getattr(value, "__dict__", ())
    parts = others if inside is None else inside
    for part in parts.values() if isinstance(parts, dict) else parts:
        if not isinstance(part, torch.Tensor):
            holders(part, found)
    return found


def tensor_in(value):
    return next(tensors_in(value))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_does_to_its_batch_is_not_done_to_the_kept_one(kind):
    use, batch = BatchUse(), KINDS[kind](torch.ones(3))
    kept = use.begin(batch)
    tensor_in(batch).zero_()
    for held in holders(batch, []):
        held.clear()
    use.end()
    assert type(kept) is type(batch) and torch.equal(tensor_in(kept), torch.ones(3))


@pytest.mark.parametrize("writes_from", [0, 5, 7])
def test_batches_of_steps_that_write_are_copied(writes_from):
    use, kept = BatchUse(), []
    for step in range(20):
        batch = {"x": torch.full((2,), float(step))}
        kept.append(use.begin(batch))
        if step >= writes_from:
            batch["x"].fill_(-1)
        use.end()
    assert [each["x"][0].item() for each in kept] == list(range(20))


def test_a_write_after_eight_steps_without_one_is_missed_once():
    use, kept = BatchUse(), []
    for step in range(20):
        batch = [torch.full((2,), float(step))]
        kept.append(use.begin(batch))
        if step >= 12:
            batch[0].fill_(-1)
        use.end()
    assert [each[0][0].item() for each in kept] == [*range(12), -1, *range(13, 20)]


def test_tensors_are_not_copied_where_no_step_writes():
    use, batch = BatchUse(), [torch.ones(2)]
    for _ in range(8):
        assert use.begin(batch)[0] is not batch[0]
        use.end()
    assert all(use.begin(batch)[0] is batch[0] for _ in range(3))


def test_a_batch_that_cannot_be_rebuilt_is_kept_itself():
    class Refusing:
        def __new__(cls, x=None):
            if x is None:
                raise TypeError("planted")
            return super().__new__(cls)

        def __init__(self, x):
            self.x = x

        __copy__ = None

    batch = Refusing(torch.ones(1))
    assert isinstance(BatchUse().begin(batch), Refusing)


def test_a_step_that_clears_its_batch_is_explained_with_the_batch_as_it_came():
    class Clearing(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch.clone(), batch_idx)
            batch.zero_()
            return loss

    net = nn.Sequential(nn.Linear(8, 8, bias=False), Planted("forward"), nn.Linear(8, 4))
    assert [event["verdict"] for event in watch(Clearing(net)).events] == ["precision"]
