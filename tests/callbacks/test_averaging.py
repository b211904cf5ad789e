"""Averages of weights stored in 16 bits: those that stock Lightning makes of fp32 weights, bit for bit."""

import pytest
import torch
from exact_gradients import Loader, Summed, batches, ran
from lightnings import ModelCheckpoint, pl
from plugin_models import same

from lightning_mixprec import optim
from lightning_mixprec.callbacks.averaging import FullWeights
from lightning_mixprec.optim import full_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*store their weights in 16 bits"),
    pytest.mark.filterwarnings("ignore:SWA is initializing"),
]


class EMA(FullWeights, pl.callbacks.EMAWeightAveraging):
    pass


class Mean(FullWeights, pl.callbacks.WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


class SWA(FullWeights, pl.callbacks.StochasticWeightAveraging):
    pass


class Validated(Summed):
    """Validated on the average at each epoch's end; keeps what it is validated with and trained from."""

    def __init__(self, *args):
        super().__init__(*args)
        self.validated = []

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.first.weight.detach().float().clone())

    def val_dataloader(self):
        return Loader(batches(1))


KINDS = {
    "EMA": lambda: EMA(decay=0.75),
    "EMA of some steps": lambda: EMA(decay=0.5, update_every_n_steps=3, update_starting_at_step=2),
    "mean of epochs": lambda: Mean(),
    "SWA": lambda: SWA(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1),
}


def ends(stored, kind, module=Validated, **options):
    _, run = ran(stored, module, callbacks=lambda: [KINDS[kind]()], **options)
    return run, {name: value.clone() for name, value in run.state_dict().items()}


@pytest.mark.parametrize("stored", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_that_of_fp32_weights(kind, stored):
    """And each validation computes with it, rounded; the run goes on with the bits that it had."""
    stock, expected = ends(None, kind)
    run, average = ends(stored, kind)
    assert same(average, expected)
    assert len(run.validated) == 4  # the first before training
    dtype = torch.bfloat16 if stored == "bf16" else torch.float16
    for mine, theirs in zip(run.validated, stock.validated, strict=True):
        torch.testing.assert_close(mine, theirs.to(dtype).float(), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("words", [("kahan", "bf16"), ("stochastic", "bf16"), ("nearest", "fp32")])
def test_what_is_validated_with_leaves_no_trace(words):
    """An average of weights that lose bits is kept with all its own bits, in validation, too."""

    def configure(where, module):
        return optim.AdamW(module.parameters(), lr=1e-2, weights=words[0], states=words[1])

    _, plain = ran("bf16", Summed, configure=configure, callbacks=lambda: [EMA(decay=0.75)])
    _, expected = ran("bf16", Validated, configure=configure, callbacks=lambda: [EMA(decay=0.75)])
    assert same(dict(plain.state_dict()), dict(expected.state_dict()))
    assert not torch.equal(plain.first.weight, plain.first.weight.bfloat16().float())


@pytest.mark.parametrize("stored", ["bf16", "fp16"])
def test_a_resumed_run_averages_on(stored, tmp_path):
    def callbacks():
        return [EMA(decay=0.75), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")]

    options = {"enable_checkpointing": True}
    _, whole = ran(stored, Validated, callbacks=callbacks, **options)
    path = tmp_path / "epoch=1.ckpt"
    _, resumed = ran(stored, Validated, callbacks=lambda: [EMA(decay=0.75)], ckpt_path=path)
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert {value.dtype for value in full_weights(path).values()} == {torch.float32}


class ByHand(Summed):
    """Averages with torch's ``AveragedModel``, its weights lent with all their bits."""

    def on_train_start(self):
        self.average = [torch.optim.swa_utils.AveragedModel(torch.nn.Linear(4, 8))]  # no submodule of this one

    def on_train_batch_end(self, *_):
        plugin = self.trainer.precision_plugin
        if hasattr(plugin, "full_weights"):
            with plugin.full_weights():
                self.average[0].update_parameters(self.first)
        else:
            self.average[0].update_parameters(self.first)


def test_averages_by_hand_are_of_full_weights():
    averages = [ran(stored, ByHand)[1].average[0].module.state_dict() for stored in (None, "bf16", "fp16")]
    assert same(averages[1], averages[0]) and same(averages[2], averages[0])


def test_the_ready_made_ones_are_lightnings():
    from lightning.pytorch import callbacks

    from lightning_mixprec.callbacks import averaging

    for name in ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"):
        assert issubclass(getattr(averaging, name), (FullWeights, getattr(callbacks, name)))
