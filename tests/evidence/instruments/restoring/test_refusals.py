"""What cannot be put back is not used by a step in a sandbox; what it leaves all the same is found, put back, told."""

import asyncio
import multiprocessing
import queue
import socket
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_mixprec.errors import MixPrecError, ReplayError, TraceLeftError
from lightning_mixprec.evidence.instruments.sandbox import is_stopped, sandbox

CPU = torch.device("cpu")


def numbers():
    yield from range(5)


class Prefetcher:
    """An object that a thread of its own fills."""

    def __init__(self):
        self.ready, self.taken = queue.Queue(), 0
        self.ready.put(1)

    def take(self):
        self.taken += 1
        return self.ready.get()


def full(kind):
    made = kind()
    made.put(1)
    return made


USED = {
    "generator": (numbers, next, lambda held: held.gi_frame.f_lineno == numbers.__code__.co_firstlineno),
    "zip": (lambda: zip([1, 2], [3, 4], strict=True), lambda held: list(held), lambda held: next(held) == (1, 3)),
    "loader": (lambda: iter(DataLoader([1, 2])), next, lambda held: next(held).item() == 1),
    "queue": (lambda: full(queue.Queue), lambda held: held.get(), lambda held: held.qsize() == 1),
    "empty queue": (queue.SimpleQueue, lambda held: held.get(), lambda held: held.empty()),
    "event": (threading.Event, lambda held: held.wait(), lambda held: not held.is_set()),
    "async queue": (asyncio.Queue, lambda held: held.put_nowait(1), lambda held: held.empty()),
    "prefetcher": (Prefetcher, lambda held: held.take(), lambda held: held.taken == 0 and held.ready.qsize() == 1),
    "method": (lambda: full(queue.Queue).get, lambda held: held(), lambda held: held.__self__.qsize() == 1),
    "socket": (socket.socket, lambda held: held.send(b"1"), lambda held: held.close() is None),
    "pipe": (lambda: multiprocessing.Pipe()[0], lambda held: held.send(1), lambda held: held.close() is None),
}


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("place", ["attribute", "container"])
def test_what_cannot_be_put_back_is_not_used(name, place):
    make, use, is_untouched = USED[name]
    model, held = nn.Linear(2, 2), make()
    model.reader = held if place == "attribute" else {"held": [held]}
    told = f"the step uses {'reader' if place == 'attribute' else 'reader.held.0'}, which cannot be put back"
    with pytest.raises(ReplayError, match=told) as caught, sandbox(model, CPU):
        use(model.reader if place == "attribute" else model.reader["held"][0])
    assert "\n" not in str(caught.value)
    assert (model.reader if place == "attribute" else model.reader["held"][0]) is held
    assert is_untouched(held)


def test_what_is_held_but_not_used_is_no_matter():
    model = nn.Linear(2, 2)
    model.held = [numbers(), queue.Queue(), Prefetcher(), threading.Lock()]
    with sandbox(model, CPU):
        model(torch.ones(1, 2))
        with model.held[3]:
            assert isinstance(model.held[1], queue.Queue)


def test_a_step_that_hides_the_error_is_refused_all_the_same():
    model = nn.Linear(2, 2)
    model.held = numbers()
    with pytest.raises(ReplayError, match="uses held"), sandbox(model, CPU):
        next_or_none(model)


def next_or_none(model):
    try:
        return next(model.held)
    except Exception:
        return None


def test_another_thread_goes_on_with_the_object_itself():
    model, seen = nn.Linear(2, 2), []
    model.held = queue.Queue()

    def work():
        model.held.put(1)
        seen.append(model.held.get() + len(model.held.queue))

    with sandbox(model, CPU):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [1]


def test_a_file_takes_what_is_written_and_nothing_is(tmp_path):
    model = nn.Linear(2, 2)
    with open(tmp_path / "log.txt", "w") as model.log:
        model.log.write("a")
        with sandbox(model, CPU):
            model.log.write("b")
            print("c", file=model.log, flush=True)
        model.log.write("d")
    assert (tmp_path / "log.txt").read_text() == "ad"


def test_a_large_array_may_be_read_and_not_written(monkeypatch):
    monkeypatch.setattr("lightning_mixprec.evidence.instruments.restoring.contents._MOST_BYTES", 64)
    model = nn.Linear(2, 2)
    model.store = types.SimpleNamespace(data=np.zeros((8, 8)))
    model.rows = model.store.data[2:]
    with sandbox(model, CPU):
        assert model.store.data.sum() == 0
    told = r"the step writes to (rows|store.data)(, store.data)?, which is too large"
    with pytest.raises(ReplayError, match=told), sandbox(model, CPU):
        model.store.data[0] = 1
    model.store.data[0] = 1
    model.rows[0] = 1


# Traces


@pytest.fixture
def trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def everything(model, optimizer):
    states = [value for each in optimizer.state.values() for value in each.values()]
    return [each.detach().clone() for each in (*model.state_dict().values(), *states)]


def same(first, second):
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
def test_a_write_to_what_the_run_goes_on_with_is_undone_and_told(trained, name):
    before, real = everything(*trained), trained[0].state_dict(keep_vars=True)[name]
    told = rf"the step writes to .* themselves \({name}\)"
    with pytest.raises(ReplayError, match=told) as caught, sandbox(trained[0], CPU), torch.no_grad():
        real += 1
    assert "\n" not in str(caught.value)
    assert same(everything(*trained), before)


@pytest.mark.parametrize("name", ["state", "gradient", "weight"])
def test_what_cannot_be_undone_is_an_error_at_once(trained, name):
    model, optimizer = trained
    real = {"state": optimizer.state[model[0].weight]["exp_avg"], "gradient": model[0].weight.grad}
    real["weight"] = model[0].weight
    opening = sandbox(model, CPU, optimizers=[optimizer])
    with pytest.raises(TraceLeftError, match="changed the training") as caught, opening, torch.no_grad():
        model[0].weight.zero_()  # the copy
        real[name].add_(1)
    assert not isinstance(caught.value, ReplayError)
    assert issubclass(TraceLeftError, MixPrecError)


def test_options_and_states_of_optimizers_are_put_back(trained):
    model, optimizer = trained
    group, state = optimizer.param_groups[0], optimizer.state[model[0].weight]
    before, average = repr(group), state["exp_avg"]
    with sandbox(model, CPU, optimizers=[optimizer]):
        group["lr"] *= 2
        group["new"] = 1
        state["exp_avg"] = average + 1
        optimizer.state.pop(next(reversed(optimizer.state)))
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    assert repr(group) == before
    assert state["exp_avg"] is average
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_parts_of_restoring_stand_alone(trained, monkeypatch, interruption):
    model, optimizer = trained
    model.odd = {"a": 1}
    before, own, state = everything(*trained), list(model.parameters()), torch.get_rng_state()

    def refuse(*args):
        raise interruption("will not")

    with (
        pytest.raises((TraceLeftError, KeyboardInterrupt), match="will not"),
        sandbox(model, CPU, optimizers=[optimizer]),
    ):
        model(torch.randn(4, 2)).sum().backward()
        model.odd["b"] = 2
        monkeypatch.setattr("lightning_mixprec.evidence.instruments.sandbox.RandomState.restore", refuse)
        torch.rand(1)
    assert all(mine is now for mine, now in zip(own, model.parameters(), strict=True))
    assert same(everything(*trained), before)
    assert model.odd == {"a": 1}
    torch.set_rng_state(state)


def test_an_opening_that_fails_half_way_is_undone(trained, monkeypatch):
    model, optimizer = trained
    before, own, grads = everything(*trained), list(model.parameters()), [each.grad for each in model.parameters()]

    def refuse(*args):
        raise OSError("will not")

    monkeypatch.setattr("lightning_mixprec.evidence.instruments.restoring.contents.Contents.open", refuse)
    with pytest.raises(OSError, match="will not"), sandbox(model, CPU):
        pass
    assert all(mine is now for mine, now in zip(own, model.parameters(), strict=True))
    assert [each.grad for each in own] == grads
    assert all(each.requires_grad for each in own)
    assert same(everything(*trained), before)


class Run:
    """What stands for a run."""


def test_after_a_trace_no_further_step_of_the_run_is_tried(trained):
    model, run = trained[0], Run()
    model.held, ran = numbers(), []
    with pytest.raises(ReplayError, match="uses held"), sandbox(model, CPU, run=run):
        next(model.held)
    assert is_stopped(run)
    with pytest.raises(ReplayError, match="uses held"), sandbox(model, CPU, run=run):
        ran.append(1)
    assert not ran
    with sandbox(model, CPU, run=Run()):
        ran.append(1)
    assert ran


def test_an_interruption_is_not_hidden_by_what_is_found(trained):
    trained[0].held = numbers()
    with pytest.raises(KeyboardInterrupt), sandbox(trained[0], CPU):
        next_or_none(trained[0])
        raise KeyboardInterrupt
