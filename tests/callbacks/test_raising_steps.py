"""A step that raises for want of precision is explained and, where a layer can move, taken again."""

from functools import partial

import pytest
import torch
from adaptive_models import ADAM, Lessons, adapt, late, stock, train
from plugin_models import Task, TwoOptimizers, same
from torch import nn

from lightning_mixprec import OverflowMonitor, PerLayerPrecision, diagnose
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision


class Checked(nn.Module):
    """Checks that what it hands on is finite, as a distribution does with its parameters."""

    def forward(self, x):
        if not bool(torch.isfinite(x).all()):
            raise ValueError("expected finite parameters, but found invalid values")
        return x


class Clock(nn.Module):
    """A solver's last step, of which 16 bits know nothing at a time of 8192."""

    def forward(self, x):
        late = x[:1, :1] * 0 + 8192
        now = late @ torch.ones_like(late)
        assert bool((now + 0.5 > now).all()), "underflow in dt"
        return x


class Filled(nn.Module):
    """A mask that is filled with a number that fp16 does not have."""

    def forward(self, x):
        return (x @ torch.eye(16)).masked_fill(x > 1e9, -1e9).clamp(min=-1e3)


class Solved(nn.Module):
    """A factorization of a matrix that is positive by less than fp16 resolves."""

    def forward(self, x):
        near = torch.eye(2) + (1 - 2e-4) * (1 - torch.eye(2))
        factor = torch.linalg.cholesky((near @ torch.eye(2)).float())
        return x * factor[0, 0]


class Looked(nn.Module):
    """A place in a table, off by one where the number of it is rounded to 11 bits."""

    def forward(self, x):
        place = torch.tensor([[4095.0]]) @ torch.ones(1, 1)
        return x + torch.zeros(4096).index_select(0, place.long().flatten()).sum()


class Careful(nn.Module):
    """Six features to two; a projection that fp16 does not hold, or one of the modules above."""

    def __init__(self, part, deviation=0.3):
        super().__init__()
        self.up, self.down, self.part = nn.Linear(6, 16), nn.Linear(16, 16), part
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)
        nn.init.normal_(self.down.weight, std=deviation)

    def forward(self, x):
        return self.head(self.norm(self.part(self.down(torch.relu(self.up(x))))))


def careful(part=Checked, deviation=0.3):
    torch.manual_seed(3)
    return Task(Careful(part(), deviation), ADAM)


loud = partial(careful, deviation=3e5)

# Name: the model, its accused layer, the operation, the format it needs, what is raised.
RAISING = {
    "a check of a value that overflowed": (loud, "net.down", "_to_copy", "bf16", ValueError),
    "a time that does not move": (partial(careful, Clock), "net.part", None, "fp32", AssertionError),
    "a constant that fp16 does not have": (partial(careful, Filled), "net.part", None, "bf16", RuntimeError),
    "a matrix that is not positive any more": (
        partial(careful, Solved), "net.part", None, "fp32", torch.linalg.LinAlgError
    ),
    "an index that is rounded out of range": (partial(careful, Looked), "net.part", None, "fp32", IndexError),
}  # fmt: skip
EACH = pytest.mark.parametrize(("make", "layer", "op", "to", "error"), RAISING.values(), ids=RAISING)


@EACH
@pytest.mark.filterwarnings("ignore:step 0, batch 0")
def test_the_layer_is_moved_the_step_is_taken_again_and_the_run_ends_as_in_fp32(make, layer, op, to, error):
    reference = late(train(make, None, batches=Lessons(20))[0].losses)
    monitor = OverflowMonitor()
    run = adapt(make, callbacks=[monitor], batches=Lessons(20))
    assert run.moves == [(layer, "fp16", to)]
    assert late(run.module.losses) < 1.2 * reference + 1e-3
    assert run.trainer.global_step == 20 - run.plugin.skipped_steps
    (event,) = [event for event in monitor.events if event["verdict"] != "scale"]
    assert (event["verdict"], event["layer"], event["op"], event["step"]) == ("precision", layer, op, 0)
    assert event["raised"].startswith(f"{error.__name__}: ") or error is torch.linalg.LinAlgError
    assert monitor.reasons["precision"] == 1


@EACH
def test_by_hand_the_same_is_said(make, layer, op, to, error):
    found = diagnose(make(), Lessons(1).batches[0], policy="fp16")
    assert (found["verdict"], found["layer"], found["op"], found["format"]) == ("precision", layer, op, "fp16")
    assert found["raised"] in found["message"]


@EACH
@pytest.mark.parametrize(
    "make_plugin", [stock, lambda: PerLayerPrecision("fp16", emulate=False)], ids=["stock", "ours"]
)
@pytest.mark.filterwarnings("ignore:step 0, batch 0")
def test_without_a_remedy_the_exception_leaves_as_it_came_with_a_note(make, layer, op, to, error, make_plugin):
    monitor = OverflowMonitor()
    with pytest.raises(error) as raised:
        train(make, make_plugin(), [monitor], batches=Lessons(4))
    assert raised.value.__notes__ == [f"lightning_mixprec: {monitor.events[0]['message']}."]
    assert f"layer '{layer}'" in raised.value.__notes__[0]
    assert raised.traceback[-1].frame.code.name in ("forward", "_dispatch")


def noisy(make_part=Checked):
    torch.manual_seed(3)
    return Task(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.2), Careful(make_part(), 3e5)), ADAM)


@pytest.mark.filterwarnings("ignore:step 0, batch 0")
def test_a_run_that_was_rescued_is_to_the_last_bit_the_one_with_the_learned_policy_from_the_start():
    """Random numbers, running statistics, optimizers, counters and the loss scale are those of one attempt."""
    rescued = adapt(noisy, callbacks=[OverflowMonitor()], batches=Lessons(8))
    assert rescued.moves == [("net.2.down", "fp16", "bf16")]
    module, run = train(noisy, PerLayerPrecision(rescued.plugin.policy), batches=Lessons(8))
    assert same(rescued.module.state_dict(), module.state_dict())
    assert same(rescued.trainer.optimizers[0].state_dict(), run.optimizers[0].state_dict())
    assert rescued.trainer.global_step == run.global_step
    assert rescued.plugin.scaler.state_dict() == run.precision_plugin.scaler.state_dict()


def test_advice_moves_nothing_and_the_exception_leaves():
    adaptive = AdaptivePrecision("advise")
    with pytest.raises(ValueError, match="expected finite parameters") as raised:
        adapt(loud, adaptive, batches=Lessons(4))
    assert [tuple(move) for decision in adaptive.decisions for move in decision["moves"]] == [
        ("net.down", "fp16", "bf16")
    ]
    assert len(raised.value.__notes__) == 1


def test_a_pinned_layer_is_no_remedy():
    with pytest.raises(ValueError, match="expected finite parameters") as raised:
        adapt(loud, AdaptivePrecision(pin=["net.*", "net", ""]), batches=Lessons(4))
    assert "'net.down'" in raised.value.__notes__[0]


class Mistaken(Task):
    """A training step with a mistake of its author's in it."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return {}["loss"]


def test_a_mistake_that_fp32_makes_too_is_nobodys_affair():
    monitor = OverflowMonitor()
    with pytest.raises(KeyError) as raised:
        adapt(lambda: Mistaken(nn.Linear(6, 2), ADAM), callbacks=[monitor], batches=Lessons(4))
    assert not hasattr(raised.value, "__notes__")
    assert (monitor.events, monitor.reasons) == ([], {})


class Backward(torch.autograd.Function):
    """The identity, whose gradient has to be finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if not bool(torch.isfinite(grad).all()):
            raise ArithmeticError("gradient is not finite")
        return grad


class Careless(nn.Module):
    """Its gradient is beyond fp16 on the way back, at every loss scale that keeps what another layer learns from."""

    def __init__(self, gain):
        super().__init__()
        self.first, self.head, self.other, self.gain = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 2), gain

    def forward(self, x):
        return self.head(Backward.apply(self.first(x) / self.gain) * self.gain) + 2.0**-30 * self.other(x)


@pytest.mark.parametrize(("gain", "verdict", "layer"), [(2.0**20, "precision", "net"), (2.0**4, "scale", None)])
@pytest.mark.filterwarnings("ignore:step 0, batch 0")
def test_what_backward_raises_is_explained_too(gain, verdict, layer):
    monitor = OverflowMonitor()
    with pytest.raises(ArithmeticError) as raised:
        train(lambda: Task(Careless(gain), ADAM), stock(), [monitor], batches=Lessons(4))
    (event,) = monitor.events
    assert (event["verdict"], event["layer"]) == (verdict, layer)
    assert raised.value.__notes__ == [f"lightning_mixprec: {event['message']}."]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["manual", "accumulating"])
@pytest.mark.filterwarnings("ignore:step 0, batch 0")
def test_where_a_step_cannot_be_taken_again_the_exception_leaves_with_a_note(options):
    monitor, make = OverflowMonitor(), loud if options else lambda: ByHand(Careful(Checked(), 3e5), ADAM)
    adaptive = AdaptivePrecision()
    with pytest.raises(ValueError, match="expected finite parameters") as raised:
        adapt(make, adaptive, callbacks=[monitor], batches=Lessons(4), **options)
    assert [event["layer"] for event in monitor.events] == ["net.down"]
    assert raised.value.__notes__ == [f"lightning_mixprec: {monitor.events[0]['message']}."]
    assert adaptive.decisions == []


class ByHand(TwoOptimizers):
    """Manual optimization."""


def test_an_exception_on_one_of_several_ranks_is_not_replayed(monkeypatch):
    from lightning_mixprec import ranks

    class Alone(Checked):
        def forward(self, x):
            monkeypatch.setattr(ranks, "are_many", lambda: True)
            raise ValueError("on this rank alone")

    monitor = OverflowMonitor()
    with pytest.raises(ValueError, match="on this rank alone") as raised:
        train(partial(careful, Alone), PerLayerPrecision("fp16"), [monitor], batches=Lessons(1))
    assert monitor.events == []
    assert "lightning_mixprec.diagnose" in raised.value.__notes__[0]
