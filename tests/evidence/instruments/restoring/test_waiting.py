"""A step that waits in a replay for what does not come is ended; locks are taken, and are as they were afterwards."""

import contextlib
import multiprocessing
import queue
import signal
import threading
import time
import types

import pytest
import torch
from plugin_models import Task, fit, mlp, ours, same
from torch import nn

from lightning_mixprec import UnderflowMonitor
from lightning_mixprec.errors import ReplayError
from lightning_mixprec.evidence.instruments.restoring import refusals, waiting
from lightning_mixprec.evidence.instruments.sandbox import sandbox

CPU = torch.device("cpu")
LOCKS = {"lock": threading.Lock, "rlock": threading.RLock}
HELD = types.SimpleNamespace()
"""Out of a module's reach."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(waiting, "SECONDS", 0.05)
    monkeypatch.setattr(refusals, "LOCK_SECONDS", 0.05)


# Waits


def taken():
    lock = threading.Lock()
    lock.acquire()
    return lock


WAITS = {
    "queue": (queue.Queue, lambda held: held.get()),
    "simple queue": (queue.SimpleQueue, lambda held: held.get()),
    "queue of processes": (multiprocessing.Queue, lambda held: held.get()),
    "event": (threading.Event, lambda held: held.wait()),
    "lock": (taken, lambda held: held.acquire()),
    "pipe": (multiprocessing.Pipe, lambda held: held[0].poll(None)),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_for_something_global_is_ended_and_told_where(name):
    make, wait = WAITS[name]
    HELD.it = make()
    with (
        pytest.raises(ReplayError, match=r"waits in a replay .* \(.* in .*\.py, line \d+\)") as caught,
        sandbox(nn.Linear(2, 2), CPU),
    ):
        wait(HELD.it)
    assert "\n" not in str(caught.value)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_a_step_that_hides_the_end_of_its_wait_is_told_all_the_same():
    hidden = contextlib.suppress(ReplayError)
    with pytest.raises(ReplayError, match="waits in a replay"), sandbox(nn.Linear(2, 2), CPU), hidden:
        queue.Queue().get()


def test_training_goes_on_after_a_wait():
    class Waiting(Task):
        def training_step(self, batch, batch_idx):
            if "log" in vars(self):  # in a replay
                queue.Queue().get()
            return super().training_step(batch, batch_idx)

    def run(callbacks):
        torch.manual_seed(0)
        fit(model := Waiting(mlp()), ours("bf16"), callbacks=callbacks)
        return model.state_dict()

    with pytest.warns(UserWarning, match="could not sample step 0 .*waits in a replay") as caught:
        watched = run([UnderflowMonitor(1)])
    assert len([each for each in caught if "waits in a replay" in str(each.message)]) == 1
    assert same(run([]), watched)


def test_what_computes_is_not_ended():
    model, end = nn.Linear(2, 2), time.thread_time() + 0.3
    with sandbox(model, CPU):
        while time.thread_time() < end:
            model(torch.ones(1, 2))


def test_somebody_else_s_alarm_is_left_alone():
    def handler(*args):
        raise AssertionError("never")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with sandbox(nn.Linear(2, 2), CPU):
            assert signal.getsignal(signal.SIGALRM) is handler
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_nothing_is_ended():
    seen = []

    def work():
        with sandbox(nn.Linear(2, 2), CPU):
            seen.append(signal.getitimer(signal.ITIMER_REAL))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0.0, 0.0)]


# Locks


def is_free(lock):
    """True for a lock that another thread can take."""
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(False)) or (got[0] and lock.release()))
    thread.start()
    thread.join()
    return got[0]


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("place", ["attribute", "object"])
def test_a_lock_that_a_step_leaves_locked_is_free_again(kind, place):
    model, lock = nn.Linear(2, 2), LOCKS[kind]()
    model.held = lock if place == "attribute" else types.SimpleNamespace(lock=lock)
    with sandbox(model, CPU):
        (model.held if place == "attribute" else model.held.lock).acquire()
    assert (model.held if place == "attribute" else model.held.lock) is lock
    assert is_free(lock)


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_a_step_lets_go_of_is_taken_again(kind):
    model = nn.Linear(2, 2)
    model.lock = LOCKS[kind]()
    model.lock.acquire()
    with sandbox(model, CPU):
        model.lock.release()
    assert not is_free(model.lock)
    model.lock.release()


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_somebody_else_holds_is_not_waited_for_without_end(kind):
    model, has, done = nn.Linear(2, 2), threading.Event(), threading.Event()
    model.lock = lock = LOCKS[kind]()

    def hold():
        with lock:
            has.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    told = "the lock lock, which somebody else holds"
    with pytest.raises(ReplayError, match=told), sandbox(model, CPU), model.lock:
        pass
    with sandbox(model, CPU):
        assert model.lock.acquire(False) is False
        assert model.lock.acquire(timeout=0.01) is False
    done.set()
    thread.join()
    assert is_free(model.lock)


def test_another_thread_takes_the_lock_itself():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with sandbox(model, CPU):
        with model.lock:
            assert not is_free(model.lock)
        assert is_free(model.lock)
