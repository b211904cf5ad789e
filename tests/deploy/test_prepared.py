"""A module and batches as the first step has them: what they are, that no step is taken, that the next fit is whole."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mixprec import MixPrecError
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
    assert len(run.callbacks) == len(fresh.callbacks)


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


@pytest.mark.filterwarnings("ignore:Total length of")
def test_data_without_a_batch_is_said():
    with pytest.raises(MixPrecError, match="no training batches"):
        prepared(trainer(), Model(count=0), lambda module, batches: None)
    with pytest.raises(MixPrecError, match="val data have no batch"):
        prepared(trainer(), Model(val_count=0), lambda module, batches: None, data="val")
