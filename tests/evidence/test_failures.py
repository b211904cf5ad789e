"""When a failed step is noticed: before anything moved, and once it is known without waiting."""

from functools import partial

import pytest
import torch
from known_results import INF, SGD, Batches, Line, Manual, slope, stock, trainer_of
from lightnings import pl
from monitor_models import FACTOR, STARVED, Watched, batches, mlp
from torch import nn

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.evidence.failures import FailureWatch, diagnosed
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats, StockFormats, formats_of
from lightning_mixprec.evidence.step_window import Outcome, StepWindow
from lightning_mixprec.optim import loss_scaling as scaling

CPU = torch.device("cpu")
OPTIMIZER = SGD([torch.zeros(1, requires_grad=True)])
FUSED = partial(SGD, fused=True)
TIMES = pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])


@pytest.fixture
def is_sent(monkeypatch):
    """The CPU stands in for an accelerator, as in test_overflow_late."""

    def send(is_late=True):
        if is_late:
            monkeypatch.setattr(scaling, "_is_read", lambda optimizer, _: not scaling.obeys_found_inf(optimizer))
            monkeypatch.setattr(StepWindow, "is_late", True)

    return send


class Diary(pl.Callback):
    """Writes down what a watch calls, with the batches of the window and how far the weights have travelled."""

    def __init__(self, settles=False):
        self.settles, self.told, self.outcomes = settles, [], []

    def on_train_start(self, trainer, module):
        self.module = module
        formats, is_automatic = formats_of(trainer, "Diary"), module.automatic_optimization
        tell = [partial(self.tell, kind) for kind in ("failure", "outcome")]
        self.watch = FailureWatch(formats, module.device, is_automatic, *tell)

    def tell(self, kind, window, outcome):
        kept = [each.batch_idx for each in window.batches]
        self.told.append((kind, window.step, kept, self.module.travelled))
        if kind == "outcome":
            self.outcomes.append((window.steps, outcome))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.told.append("begin")
        self.watch.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer, module, loss):
        self.watch.add_loss(loss)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.watch.before_step(optimizer, trainer.global_step)

    def on_train_batch_end(self, *_):
        self.watch.end_batch(lambda: self.settles)

    def on_train_end(self, *_):
        self.watch.settle()


def told(model, plugin, values, settles=False, **options):
    diary = Diary(settles)
    trainer_of(plugin, callbacks=[diary], **options).fit(model, Batches(values))
    return diary


def test_a_failure_is_told_before_the_optimizer_moves_and_the_outcome_after():
    diary = told(Line(), stock("32-true"), [0.5, -INF, 0.25])
    assert diary.told == [
        *("begin", ("outcome", 0, [0], 0.5)),
        *("begin", ("failure", 1, [1], 0.5), ("outcome", 1, [1], -INF)),
        *("begin", ("failure", 2, [2], -INF), ("outcome", 2, [2], -INF)),
    ]


@pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])
def test_a_late_failure_is_told_before_the_next_step_moves(make_plugin, is_sent):
    is_sent()
    diary = told(Line(FUSED), make_plugin(), [0.5, INF, 0.25])
    assert [entry if entry == "begin" else entry[::3] for entry in diary.told] == [
        *("begin", "begin", ("outcome", 0.5)),
        *("begin", ("failure", 0.5), ("outcome", 0.5)),
        ("outcome", 0.75),
    ]


def test_a_late_outcome_is_waited_for_if_asked(is_sent):
    is_sent()
    diary = told(Line(FUSED), PerLayerPrecision("fp16"), [0.5, INF], settles=True)
    assert diary.told == [
        *("begin", ("outcome", 0, [0], 0.5)),
        *("begin", ("failure", 1, [1], 0.5), ("outcome", 1, [1], 0.5)),
    ]


@TIMES
def test_the_window_of_an_accumulation_holds_its_batches_alone(is_late, is_sent):
    is_sent(is_late)
    model, plugin = Line(FUSED if is_late else SGD), PerLayerPrecision("fp16")
    diary = told(model, plugin, [0.5, 0.25, INF, 0.5, 0.25], accumulate_grad_batches=2)
    assert [entry[:3] for entry in diary.told if entry != "begin"] == [
        ("outcome", 0, [0, 1]),
        *(("failure", 1, [2, 3]), ("outcome", 1, [2, 3])),
        ("outcome", 1, [4]),
    ]


def two_steps(model, batch, _):
    for optimizer, layer, part in zip(model.optimizers(), (model.a, model.b), batch, strict=True):
        optimizer.zero_grad()
        model.manual_backward(slope(layer, part))
        optimizer.step()


@TIMES
def test_two_steps_in_a_batch_are_one_outcome(is_late, is_sent):
    is_sent(is_late)
    model = Manual(two_steps, lambda model: [FUSED(model.a.parameters()), FUSED(model.b.parameters())])
    diary = told(model, PerLayerPrecision("fp16"), [(INF, 0.5), (0.5, 0.5)])
    assert [entry[::2] for entry in diary.told if entry != "begin"] == [
        *(("failure", [0]), ("outcome", [0])),
        ("outcome", [1]),
    ]
    assert diary.outcomes == [(2, Outcome(True, 1, 65536.0)), (2, Outcome(False, 0, 32768.0))]


def every_other(model, batch, batch_idx):
    optimizer = model.optimizers()
    model.manual_backward(slope(model.a, batch))
    if batch_idx % 2:
        optimizer.step()
        optimizer.zero_grad()


def test_a_batch_without_a_step_stays_in_the_window():
    model = Manual(every_other, lambda model: SGD(model.a.parameters()))
    diary = told(model, PerLayerPrecision("fp32"), [INF, 0.5, 0.25, 0.5, 0.25])
    assert [entry if entry == "begin" else entry[:3] for entry in diary.told] == [
        *("begin", "begin", ("failure", 0, [0, 1]), ("outcome", 0, [0, 1])),
        *("begin", "begin", ("outcome", 0, [2, 3])),
        "begin",
    ]


def by_hand():
    """A watch of an fp32 run without a Trainer, and what it tells: each call's batches."""
    calls = []

    def tell(kind, window, outcome):
        calls.append((kind, len(window.batches)))

    formats = StockFormats(stock("32-true"), pl.LightningModule(), CPU)
    return FailureWatch(formats, CPU, True, partial(tell, "failure"), partial(tell, "outcome")), calls


def step(watch):
    watch.begin_batch(torch.zeros(1), 0)
    watch.add_loss(torch.tensor(INF))
    watch.before_step(OPTIMIZER, 0)


def test_after_an_exception_the_step_that_it_ended_is_forgotten():
    watch, calls = by_hand()
    step(watch)
    watch.abandon()
    watch.end_batch(lambda: True)
    assert calls == [("failure", 1)]


def test_after_an_exception_what_is_on_its_way_counts_and_its_batches_are_not_kept(is_sent):
    is_sent()
    watch, calls = by_hand()
    step(watch)
    watch.end_batch(lambda: False)
    assert calls == []
    watch.abandon()
    watch.settle()
    assert calls == [("failure", 0), ("outcome", 0)]


def test_what_happens_outside_a_batch_is_no_evidence():
    watch, calls = by_hand()
    watch.add_loss(torch.tensor(INF))
    watch.before_step(OPTIMIZER, 0)
    watch.end_batch(lambda: True)
    watch.settle()
    watch.abandon()
    assert calls == []


class Fragile(Watched):
    """Raises at a batch of ones."""

    def training_step(self, batch, batch_idx):
        if (batch == 1).all():
            raise RuntimeError("planted\nwith a traceback")
        return super().training_step(batch, batch_idx)


def search(net, values, weight=STARVED):
    model = Fragile(net, weight)
    formats = PolicyFormats(model, "fp16", CPU, 65536.0)
    window = StepWindow(formats, CPU, True)
    for batch_idx, batch in enumerate(values):
        window.add_batch(batch, batch_idx, None)
    found, problems = diagnosed(StepReplay(model, formats, CPU), window, 65536.0)
    verdict = None if found is None else (found.rank, found.kept.batch_idx, found.diagnosis.cause["verdict"])
    return verdict, [tuple(problem) for problem in problems]


GOOD, ONES = batches(1)[0], torch.ones(4, 8)
CANNOT = "RuntimeError: planted"


def test_of_several_guilty_batches_the_latest_is_accused():
    assert search(mlp("forward"), [GOOD, GOOD]) == ((0, 1, "precision"), [])
    assert search(mlp(None), [GOOD, GOOD * float("nan"), GOOD]) == ((0, 1, "data"), [])


def test_a_layer_is_accused_before_the_scale():
    # The loss is the square of what the network gives: batch 1 needs a smaller scale, batch 0 no scale helps.
    net = nn.Sequential(nn.Linear(8, 4, bias=False))
    nn.init.constant_(net[0].weight, 1.0)
    large, huge = torch.full((4, 8), 64.0), torch.full((4, 8), FACTOR)
    assert search(net, [huge, large], weight=1.0) == ((0, 0, "precision"), [])
    assert search(net, [GOOD, large], weight=1.0) == ((0, 1, "scale"), [])
    assert search(net, [2 * large, large], weight=1.0) == ((0, 1, "scale"), [])


def test_a_batch_that_cannot_be_replayed_is_told_and_the_others_are_searched():
    assert search(mlp("forward"), [GOOD, ONES]) == ((0, 0, "precision"), [(1, CANNOT)])
    assert search(mlp("forward"), [ONES]) == (None, [(0, CANNOT)])


def test_finite_batches_accuse_nobody():
    assert search(mlp(None), [GOOD, GOOD]) == (None, [])
    assert search(mlp(None), []) == (None, [])
