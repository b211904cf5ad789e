"""What a step changes in global variables, classes and the context is put back: found by the names in its code."""

import array
import contextvars
import functools
import random
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from lightning_mixprec.errors import ReplayError
from lightning_mixprec.evidence.instruments.restoring.code_names import named_by
from lightning_mixprec.evidence.instruments.sandbox import sandbox

CPU = torch.device("cpu")
COUNT, KEPT, DRAWN = 0, {"rows": [1]}, random.Random(3)
LEVEL, UNSET = contextvars.ContextVar("level", default=0), contextvars.ContextVar("unset", default=None)
STREAM = iter(map(str, range(100)))
TEACHER = nn.BatchNorm1d(2)


class World:
    made = 0
    past: list = []

    def __init__(self):
        World.made += 1
        self.place = 0.0

    def step(self):
        self.place += DRAWN.random()
        type(self).past.append(self.place)
        World.latest = self.place


WORLD = World()


class Bar:
    """Holds what others are at work on, as a bar of progress does."""

    def __init__(self):
        self.event, self.calls = threading.Event(), 0

    def update(self):
        self.calls += 1


BAR = Bar()


def helper():
    KEPT["rows"].append(2)
    KEPT["more"] = COUNT


@functools.lru_cache
def table(size, dtype):
    return torch.arange(size, dtype=dtype)


def counts():
    global COUNT, MADE
    COUNT += 1
    MADE = COUNT


def plays():
    WORLD.step()


def makes():
    World()


def sets_context():
    LEVEL.set(LEVEL.get() + 1)
    UNSET.set(5)


def calls_teacher():
    TEACHER(torch.randn(4, 2))


def fills_cache():
    table(3, torch.float64)


def everything():
    teacher = [each.clone() for each in TEACHER.buffers()]
    cache = table.cache_info()[1:]
    kept = {name: list(value) if isinstance(value, list) else value for name, value in KEPT.items()}
    world = (WORLD.place, World.made, list(World.past), hasattr(World, "latest"), DRAWN.getstate())
    context = (LEVEL.get(), UNSET.get())
    return [COUNT, "MADE" in globals(), kept, world, context, cache, list(map(torch.Tensor.tolist, teacher))]


class Acting(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act, self.linear = act, nn.Linear(2, 2)

    def forward(self, x):
        self.act()
        return self.linear(x)


@pytest.mark.parametrize("act", [counts, helper, plays, makes, sets_context, calls_teacher, fills_cache])
def test_what_the_code_names_is_put_back(act):
    model, before = Acting(act), everything()
    with sandbox(model, CPU):
        model(torch.ones(1, 2))
        assert everything() != before
    assert everything() == before


def test_names_are_found_in_whatever_the_code_calls_and_within_functions_of_functions():
    def outer():
        return [helper() for _ in range(2)]

    names = named_by(outer)
    assert names is not None and "helper" in names.variables
    assert named_by(nn.Linear.forward) is None


def test_a_global_iterator_is_not_taken_from():
    def takes():
        next(STREAM)

    model = Acting(takes)
    with pytest.raises(ReplayError, match="STREAM"), sandbox(model, CPU):
        model(torch.ones(1, 2))
    assert next(STREAM) == "0"


def test_what_others_are_at_work_on_goes_on_where_it_is_not_the_modules_own():
    model, calls = Acting(lambda: BAR.update()), BAR.calls
    with sandbox(model, CPU):
        model(torch.ones(1, 2))
    assert BAR.calls == calls + 1


def test_a_weight_behind_a_weak_reference_is_its_stand_in():
    model = Acting(lambda: None)
    model.reference, before = weakref.ref(model.linear.weight), model.linear.weight.detach().clone()
    with sandbox(model, CPU) as stand_ins:
        assert model.reference() is stand_ins.parameters["linear.weight"]
        model.reference().data.fill_(3)
    assert torch.equal(model.linear.weight, before) and model.reference() is model.linear.weight


def test_bytes_and_numbers_of_the_standard_library_are_put_back():
    model = Acting(lambda: None)
    model.seen, model.counted = bytearray(b"ab"), array.array("d", [1.0, float("nan")])
    with sandbox(model, CPU):
        model.seen += b"c"
        model.seen[0] = 0
        model.counted.append(2.0)
        model.counted[0] = 5.0
    assert model.seen == b"ab" and model.counted[0] == 1.0 and len(model.counted) == 2


class Talks(nn.Linear):
    def forward(self, x):
        self.trainer.datamodule.rows.append(1)
        self.trainer.callbacks[0].calls += 1
        return super().forward(x)


class Run:
    """A Trainer: of a class that is looked into as little as Lightning's."""

    __module__, train_dataloader = "lightning.pytorch", None

    def __init__(self):
        self.callbacks, self.datamodule = [World()], World()


def test_what_a_step_changes_through_its_trainer_is_put_back():
    model, run = Talks(2, 2), Run()
    model.trainer, run.datamodule.rows, run.callbacks[0].calls = run, [], 0
    with sandbox(model, CPU, run=run):
        model(torch.ones(1, 2))
        assert run.datamodule.rows == [1]
    assert run.datamodule.rows == [] and run.callbacks[0].calls == 0


def test_variables_of_another_file_of_the_users_are_put_back(monkeypatch, tmp_path):
    (tmp_path / "settings_of_mine.py").write_text("step = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import settings_of_mine

    globals()["settings"] = settings_of_mine
    try:
        model = Acting(advance)
        with sandbox(model, CPU):
            model(torch.ones(1, 2))
            assert settings_of_mine.step == 1
        assert settings_of_mine.step == 0
    finally:
        del globals()["settings"], sys.modules["settings_of_mine"]


def advance():
    settings.step += 1  # noqa: F821
