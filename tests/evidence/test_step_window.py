"""Which random numbers are kept of a step: those it begins with, as long as steps use any."""

import pytest
import torch

from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.step_window import RandomUse

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
