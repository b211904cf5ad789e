"""Small results reach the host as they were when they were sent."""

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_mixprec.engine import transfer
from lightning_mixprec.engine.transfer import Transfer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_arrives_is_what_was_sent_even_if_that_changes_later(device):
    floats, counts = torch.tensor([1.5, 2.5], device=device, requires_grad=True), torch.arange(3, device=device)
    sent = Transfer([floats, counts, torch.tensor(0.5, dtype=torch.float64)])
    with torch.no_grad():
        floats.mul_(100)
        counts.zero_()
    arrived = sent.get()
    assert [value.tolist() for value in arrived] == [[1.5, 2.5], [0, 1, 2], 0.5]
    assert [value.dtype for value in arrived] == [torch.float32, torch.int64, torch.float64]
    assert all(value.device.type == "cpu" and not value.requires_grad for value in arrived)
    assert sent.is_ready


def test_nothing_can_be_sent():
    assert Transfer([]).get() == []


@pytest.mark.gpu
def test_sending_does_not_wait_for_the_device():
    value = torch.ones(4, device="cuda")
    Transfer([value + 1]).get()  # loads the kernel and makes the pinned memory, both of which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10**8)
        sent = Transfer([value + 1])
        assert not sent.is_ready
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sent.get()[0].tolist() == [2, 2, 2, 2]


def test_whoever_waits_leaves_the_core_to_others(monkeypatch):
    """On a simulated device, whose event says how it is waited for."""
    made = []

    class Event:
        def __init__(self, enable_timing=False, blocking=False):
            made.append(blocking)

        def record(self, stream):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(transfer, "_to_host", lambda tensor: tensor)
    with FakeTensorMode():
        Transfer([torch.empty(3, device="cuda")])
    assert made == [True]


@pytest.mark.gpu
def test_on_cuda_waiting_takes_no_processor_time():
    value = torch.ones(4, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)
    sent = Transfer([value + 1])
    began, worked = time.perf_counter(), time.thread_time()
    sent.get()
    assert time.perf_counter() - began > 0.2
    assert time.thread_time() - worked < 0.5 * (time.perf_counter() - began)
