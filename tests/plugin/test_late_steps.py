"""A fused optimizer on an accelerator is never waited for: what its skipped steps must not move is put right later.

The CPU stands in for the accelerator by not reading the flag that its fused optimizers obey, too; tests marked ``gpu``
do the same on CUDA.
"""

import copy
from functools import partial

import pytest
import torch
from known_results import INF, SGD, Line, Manual, Saving, fit, ours, slope, stock
from lightnings import WeightAveraging, pl
from plugin_models import Call
from torch.optim.lr_scheduler import ExponentialLR

from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.optim import loss_scaling as scaling
from lightning_mixprec.plugin import steps as plugin_steps

FUSED = partial(SGD, fused=True)
RUNS = {
    "one skip": [0.5, INF, 0.25, 0.5],
    "the first": [INF, 0.5, 0.25],
    "several in a row": [0.5, INF, INF, INF, 0.25, 0.5, 0.125, 0.25],
    "the last": [0.5, 0.25, INF],
    "the last two": [0.5, 0.25, INF, INF],
    "every other": [INF, 0.5, INF, 0.25, INF, 0.125, 0.25],
}


@pytest.fixture
def late(monkeypatch):
    """Fused optimizers obey the flag on the device, as on CUDA."""
    monkeypatch.setattr(scaling, "_is_read", lambda optimizer, _: not scaling.obeys_found_inf(optimizer))


def halving(optimizer, frequency=1):
    return {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step", "frequency": frequency}


def real(values):
    return [value for value in values if value != INF]


def outcome(model, plugin, trainer):
    """Everything that a skipped step must not move."""
    return {
        "weights": model.layer.weight.tolist(),
        "global_step": trainer.global_step,
        "skipped": plugin.skipped_steps,
        "scale": plugin.scaler.get_scale(),
    }


def rate(trainer):
    return trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("kind", [SGD, partial(SGD, momentum=0.5), partial(torch.optim.AdamW, lr=0.1)])
@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
def test_a_late_outcome_ends_in_what_a_run_without_the_skipped_batches_ends_in(values, kind):
    kind = partial(kind, fused=True)
    model, oracle, plugin = Line(kind), Line(kind), ours()
    trainer = fit(model, plugin, values)
    fit(oracle, stock("32-true"), real(values))
    assert outcome(model, plugin, trainer) == {
        "weights": oracle.layer.weight.tolist(),
        "global_step": len(real(values)),
        "skipped": len(values) - len(real(values)),
        "scale": 65536.0 / 2 ** (len(values) - len(real(values))),
    }


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
def test_a_learning_rate_is_at_most_one_step_ahead_and_catches_up(values):
    trainer = fit(Line(FUSED, halving), ours(), values)
    is_ahead = values[-1] == INF
    assert rate(trainer) == 0.5 ** (len(real(values)) + is_ahead)


@pytest.mark.usefixtures("late")
def test_a_schedule_every_two_steps_counts_real_steps():
    values = [0.25, INF, 0.5, 0.25, INF, 0.125, 0.25, 0.125]
    schedule = partial(halving, frequency=2)
    trainer, oracle = fit(Line(FUSED, schedule), ours(), values), fit(Line(FUSED, schedule), stock(), real(values))
    assert rate(trainer) == rate(oracle)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_max_steps_are_real_steps(values, max_steps):
    model = Line(FUSED)
    trainer = fit(model, ours(), values, max_steps=max_steps, max_epochs=-1)
    epochs = real(values) * max_steps
    assert trainer.global_step == max_steps
    assert model.travelled == sum(epochs[:max_steps])


def several_steps(model, batch, _):
    for optimizer, layer, parts in zip(model.optimizers(), (model.a, model.b), batch, strict=True):
        for part in parts:
            optimizer.zero_grad()
            model.manual_backward(slope(layer, part))
            optimizer.step()


@pytest.mark.usefixtures("late")
def test_several_optimizers_that_step_several_times_settle_every_step():
    model = Manual(several_steps, lambda model: [FUSED(model.a.parameters()), FUSED(model.b.parameters())])
    plugin = ours()
    trainer = fit(model, plugin, [((0.5, INF), (INF, 0.25)), ((INF, 0.5), (0.5, INF)), ((0.25, 0.25), (INF, INF))])
    assert model.travelled == [1.5, 0.75]
    assert (plugin.skipped_steps, trainer.global_step) == (6, 6)
    assert plugin.scaler.get_scale() == 65536.0 / 8


@pytest.mark.usefixtures("late")
def test_whoever_asks_hears_of_the_step_just_taken():
    plugin, seen = ours(), []

    def asks(model, batch, _):
        optimizer, _ = model.optimizers()
        optimizer.zero_grad()
        model.manual_backward(slope(model.a, batch))
        optimizer.step()
        seen.append((plugin.step_was_skipped(optimizer), plugin.skipped_steps, model.trainer.global_step))

    values = [0.5, INF, INF, 0.25]
    fit(Manual(asks, lambda model: [FUSED(model.a.parameters()), FUSED(model.b.parameters())]), plugin, values)
    assert seen == [(False, 0, 1), (True, 1, 1), (True, 2, 1), (False, 2, 2)]


@pytest.mark.usefixtures("late")
def test_a_change_of_the_policy_is_written_down_at_its_real_step():
    plugin = ours()
    change = Call("on_train_batch_end", lambda *_: plugin.set_policy("bf16"), at=1)
    fit(Line(FUSED), plugin, [0.5, INF, 0.25], callbacks=[change])
    assert [entry["step"] for entry in plugin.history] == [1]


@pytest.mark.usefixtures("late")
def test_averaged_weights_count_each_real_step_once():
    callback = WeightAveraging()
    fit(Line(FUSED), ours(), RUNS["several in a row"], callbacks=[callback])
    assert callback._latest_update_step == len(real(RUNS["several in a row"]))


class Everything(pl.Callback):
    """The state of a run at the end of each batch."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append((trainer.global_step, rate(trainer)))


@pytest.mark.usefixtures("late")
def test_no_batch_ends_more_than_one_step_ahead():
    values = RUNS["several in a row"]
    spy = Everything()
    fit(Line(FUSED, halving), ours(), values, callbacks=[spy])
    for index, (step, learning_rate) in enumerate(spy.seen):
        taken = len(real(values[: index + 1]))
        assert taken <= step <= taken + 1
        assert learning_rate in (0.5**taken, 0.5 ** (taken + 1))


# Lightning takes a global_step that is no multiple of the batches for a checkpoint from within an epoch.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("values", [RUNS["the last"], RUNS["the last two"], RUNS["one skip"]], ids=str)
@pytest.mark.parametrize("moment", ["epoch", "batch"])
def test_a_checkpoint_written_while_an_outcome_is_on_its_way_resumes_right(values, moment, tmp_path):
    path = tmp_path / "run.ckpt"
    saving = Saving(path, batch=len(values) - 1 if moment == "batch" else None)
    whole, resumed = Line(FUSED, halving), Line(FUSED, halving)
    plugins = ours(), ours()
    fit(Line(FUSED, halving), ours(), values, callbacks=[saving])
    trainers = fit(whole, plugins[0], values, max_epochs=3), fit(resumed, plugins[1], values, path, max_epochs=3)
    assert outcome(resumed, plugins[1], trainers[1]) == outcome(whole, plugins[0], trainers[0])
    assert rate(trainers[1]) == rate(trainers[0])


@pytest.mark.usefixtures("late")
def test_the_host_asks_about_the_last_step_when_the_device_has_its_next_work(monkeypatch):
    diary = []

    class Noted(Transfer):
        def get(self):
            diary.append("wait")
            return super().get()

    monkeypatch.setattr(plugin_steps, "Transfer", Noted)

    class Diarist(Line):
        def on_after_backward(self):
            diary.append("backward")

    fit(Diarist(FUSED), ours(), [0.5, INF, 0.25])
    assert diary == ["backward", "backward", "wait", "backward", "wait", "wait"]


class OnTheDevice(Line):
    """Logs nothing: logging reads values."""

    def training_step(self, batch, batch_idx):
        return slope(self.layer, batch)


class NoWaiting(pl.Callback):
    """Turns every host synchronisation into an error, from the second batch on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

    def on_train_batch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["fp16", "bf16"])
def test_on_cuda_a_fused_step_waits_for_nothing(policy):
    plugin, model = ours(policy), OnTheDevice(FUSED, halving)
    try:
        trainer = fit(model, plugin, RUNS["several in a row"], accelerator="cuda", callbacks=[NoWaiting()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plugin.skipped_steps == 3
    assert model.travelled == sum(real(RUNS["several in a row"]))
    assert (trainer.global_step, rate(trainer)) == (5, 0.5**5)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
def test_on_cuda_a_run_ends_in_what_a_run_without_the_skipped_batches_ends_in(values, fused):
    kind = partial(torch.optim.AdamW, lr=0.1, fused=fused)
    model, oracle, plugin = Line(kind), Line(kind), ours()
    trainer = fit(model, plugin, values, accelerator="cuda")
    fit(oracle, stock("32-true"), real(values), accelerator="cuda")
    assert torch.equal(model.layer.weight.cpu(), oracle.layer.weight.cpu())
    assert (trainer.global_step, plugin.skipped_steps) == (len(real(values)), len(values) - len(real(values)))


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_on_cuda_fused_momentum_is_sound_after_a_skipped_first_step(momentum):
    kind = partial(FUSED, momentum=momentum)
    model, oracle = Line(kind), Line(kind)
    fit(model, ours(), [INF, INF, 0.5, 0.25], accelerator="cuda")
    fit(oracle, stock("32-true"), [0.5, 0.25], accelerator="cuda")
    assert torch.equal(model.layer.weight.cpu(), oracle.layer.weight.cpu())


@pytest.mark.gpu
def test_on_cuda_batchnorm_is_put_back_without_reading_the_flag():
    def normed():
        model = OnTheDevice(FUSED)
        model.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(2), copy.deepcopy(model.layer))
        return model

    model, oracle = normed(), normed()
    noise = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    fit(model, ours(), [*noise[:3], INF, *noise[3:]], accelerator="cuda")
    fit(oracle, stock("16-mixed", "cuda"), noise, accelerator="cuda")
    assert model.state_dict().keys() == oracle.state_dict().keys()
    for name, buffer in oracle.named_buffers():
        assert torch.equal(model.get_buffer(name).cpu(), buffer.cpu()), name
