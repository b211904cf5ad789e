"""A module and batches as the first step has them: what they are, that no step is taken, that the next fit is whole."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision
from lightning_mixprec.deploy.prepared import prepared


class Model(pl.LightningModule):
    """Scales its batches in a hook, makes its layer in ``configure_model`` and asks for its Trainer."""

    def __init__(self, count=6, val_count=2):
        super().__init__()
        self.count, self.val_count, self.layer = count, val_count, None
        self.steps = 0

    def configure_model(self):
        if self.layer is None:
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [2 * batch[0]]

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.layer(batch[0]).mean() / (1 + self.trainer.current_epoch)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(3.0 * self.count).view(-1, 3)), batch_size=2)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(self.val_count, 3)), batch_size=1)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    options = {"max_epochs": 2, "min_epochs": 1, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["training_step", "configure_optimizers", "train_dataloader"])
def test_a_module_with_which_no_run_begins_is_one_line(name):
    class Bare(Model):
        pass

    setattr(Bare, name, getattr(pl.LightningModule, name))
    with pytest.raises(MixPrecError, match=f"^the Trainer cannot begin a run: .*`{name}") as raised:
        prepared(trainer(), Bare(), len)
    assert "\n" not in str(raised.value)


def test_the_first_batches_come_through_the_hooks_and_no_step_is_taken():
    model, seen = Model(), []
    run = trainer()

    def work(module, batches):
        seen.append((module.layer.weight.detach().clone(), module.trainer is run, len(run.optimizers)))
        return [batch[0] for batch in batches]

    batches = prepared(run, model, work, batches=2)
    assert [batch.tolist() for batch in batches] == [[[0, 2, 4], [6, 8, 10]], [[12, 14, 16], [18, 20, 22]]]
    assert (model.steps, run.global_step, run.should_stop) == (0, 0, False)
    [(weight, has_trainer, optimizers)] = seen
    assert has_trainer and optimizers == 1 and torch.equal(model.layer.weight, weight)


def test_the_trainer_runs_whole_afterwards():
    model, other = Model(), Model()
    run, fresh = trainer(), trainer()
    prepared(run, model, lambda module, batches: None)
    run.fit(model)
    fresh.fit(other)
    assert run.global_step == fresh.global_step == 6
    assert torch.equal(model.layer.weight, other.layer.weight)
    assert list(map(type, run.callbacks)) == list(map(type, fresh.callbacks))


def test_batches_of_validation():
    batches = prepared(trainer(), Model(), lambda module, batches: batches, data="val", batches=9)
    assert [batch[0].tolist() for batch in batches] == [[[2.0, 2.0, 2.0]]] * 2


def test_weights_of_a_checkpoint(tmp_path):
    trained, run = Model(), trainer()
    run.fit(trained)
    run.save_checkpoint(tmp_path / "trained.ckpt")
    weight = prepared(
        trainer(), Model(), lambda module, _: module.layer.weight.detach(), ckpt_path=tmp_path / "trained.ckpt"
    )
    assert torch.equal(weight, trained.layer.weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batches": 0}, "batches is 0; it has to be a positive integer."),
        ({"ckpt_path": "none.ckpt"}, "'none.ckpt' cannot be read as a checkpoint"),
        ({"ckpt_path": "other.ckpt"}, "the weights of 'other.ckpt' are not those of Model: .*Missing key"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"elsewhere": torch.ones(1)}}, "other.ckpt")
    with pytest.raises(MixPrecError, match=says) as error:
        prepared(trainer(), Model(), lambda module, batches: None, **options)
    assert "\n" not in str(error.value)


class Measured(Model):
    """Logs a metric in validation, and fails where an epoch of validation ends without a batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch[0].sum())
        self.log("val_sum", self.seen[-1])

    def on_validation_epoch_end(self):
        self.log("val_all", torch.stack(self.seen).sum())


class Counting(pl.Callback):
    calls = 0

    def setup(self, trainer, pl_module, stage):
        self.calls += 1


@pytest.mark.parametrize("has_run", [False, True])
def test_validation_is_begun_whether_the_trainer_has_run_or_not_and_leaves_no_trace(has_run):
    model, plugin, callback = Measured(), PerLayerPrecision({"default": "bf16"}), Counting()
    run = trainer(plugins=plugin, callbacks=[callback, OverflowMonitor()], max_epochs=1)
    if has_run:
        run.fit(model)
    model.train()
    shown, calls, seen, steps = dict(run.callback_metrics), callback.calls, len(model.seen), run.global_step
    assert (shown != {}) == has_run

    def work(module, batches):
        assert module.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert module.trainer is run and type(run.precision_plugin) is not PerLayerPrecision
        assert not any(batch[0].is_inference() for batch in batches)
        return len(batches)

    assert prepared(run, model, work, data="val", batches=9) == 2
    assert run.precision_plugin is plugin and run.callbacks[:1] == [callback] and callback.calls == calls
    assert dict(run.callback_metrics) == shown and len(model.seen) == seen and run.global_step == steps
    assert model.training and (model._trainer is not None) == has_run
    if not has_run:
        run.fit(model)
        assert run.global_step == 3


def test_data_for_validation_need_no_step_of_validation():
    class Stepless(Model):
        validation_step = pl.LightningModule.validation_step

    model = Stepless()
    assert prepared(trainer(), model, lambda module, batches: len(batches), data="val") == 2
    assert "validation_step" not in vars(model)


def test_a_trainer_that_cannot_begin_says_why():
    model, run = Model(), trainer(max_epochs=1)
    run.fit(model)
    with pytest.raises(MixPrecError, match=r"has run to its end \(max_epochs=1, max_steps=-1\); give one that has not"):
        prepared(run, model, lambda module, batches: None)

    class Within(pl.Callback):
        said = ""

        def on_train_end(self, trainer, pl_module):
            with pytest.raises(MixPrecError, match="the Trainer is in a run"):
                prepared(trainer, pl_module, lambda module, batches: None, data="val")
            self.said = "it was asked"

    callback = Within()
    trainer(max_epochs=1, callbacks=[callback]).fit(Model())
    assert callback.said

    class Dataless(Model):
        val_dataloader = pl.LightningModule.val_dataloader

    with pytest.raises(MixPrecError, match="the Trainer cannot begin a run: .*val_dataloader") as error:
        prepared(trainer(), Dataless(), lambda module, batches: None, data="val")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Total length of")
def test_data_without_a_batch_is_said():
    with pytest.raises(MixPrecError, match="no training batches"):
        prepared(trainer(), Model(count=0), lambda module, batches: None)
    with pytest.raises(MixPrecError, match="val data have no batch"):
        prepared(trainer(), Model(val_count=0), lambda module, batches: None, data="val")
