"""Weights that a policy stores in 16 bits: no bit is lost on the way in, in steps, through checkpoints, or back out."""

import pytest
import torch
from lightnings import pl
from plugin_models import same

from lightning_mixprec import LossScaling, PerLayerPrecision
from lightning_mixprec.errors import SupportError
from lightning_mixprec.optim import SGD, AdamW, fp32_state_dict, full_weights

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
POLICY = {"default": "fp32", "first": "p=bf16"}
OPTIMIZERS = {"adamw": AdamW, "sgd": lambda params, **options: SGD(params, momentum=0.9, **options)}


class Net(pl.LightningModule):
    """Two layers, of which policies here store the first one in 16 bits, and one batch: each step is an epoch."""

    def __init__(self, optimizer=AdamW, freezes=False, **options):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        self.first.bias.requires_grad_(not freezes)
        self.make, self.options, self.seen = optimizer, {"lr": 1e-2, **options}, []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.first.weight.dtype)
        return self.second(torch.relu(self.first(batch))).square().mean()

    def configure_optimizers(self):
        return self.make([param for param in self.parameters() if param.requires_grad], **self.options)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(2)
        return torch.utils.data.DataLoader(torch.randn(3, 4, generator=generator), batch_size=3)


def net(**options):
    torch.manual_seed(0)
    return Net(**options)


def fitted(module, policy=POLICY, ckpt_path=None, steps=6, keep=None, **options):
    plugin = PerLayerPrecision(policy, **options)
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=isinstance(keep, pl.callbacks.ModelCheckpoint),
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        plugins=plugin,
        callbacks=[keep] if keep is not None else [],
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


class Looks(pl.Callback):
    """Notes what is stored, and the full weights, as training begins and ends."""

    def __init__(self):
        self.begun = self.ended = None

    def on_train_start(self, trainer, module):
        self.begun = fp32_state_dict(module, trainer.optimizers)

    def on_train_end(self, trainer, module):
        self.ended = fp32_state_dict(module, trainer.optimizers)


@pytest.mark.parametrize("param", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_begin_and_end_with_all_their_bits(optimizer, param):
    module, looks = net(optimizer=OPTIMIZERS[optimizer]), Looks()
    before = bits(module)
    fitted(module, {"default": "fp32", "first": f"p={param}"}, keep=looks)
    assert set(module.seen) == {torch.bfloat16 if param == "bf16" else torch.float16}
    assert same(looks.begun, before)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert same(bits(module), looks.ended)
    assert not torch.equal(module.first.weight, before["first.weight"])


def test_frozen_weights_come_back_as_they_were():
    module = net(freezes=True)
    before = bits(module)
    fitted(module)
    assert torch.equal(module.first.bias, before["first.bias"])
    fitted_alone = net()
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, plugins=PerLayerPrecision(POLICY), accelerator="cpu")
    fitted_alone.validation_step = lambda batch, batch_idx: fitted_alone.training_step(batch, batch_idx)
    before = bits(fitted_alone)
    trainer.validate(fitted_alone, fitted_alone.train_dataloader(), verbose=False)
    assert same(bits(fitted_alone), before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(optimizer, tmp_path):
    options = {"optimizer": OPTIMIZERS[optimizer]}
    whole = net(**options)
    fitted(whole)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_on_train_epoch_end=True, save_top_k=-1, filename="{step}")
    fitted(net(**options), keep=keep)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert saved["state_dict"]["first.weight"].dtype == torch.bfloat16
    resumed = net(**options)
    torch.manual_seed(5)
    for param in resumed.parameters():
        torch.nn.init.normal_(param)
    fitted(resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert same(bits(resumed), bits(whole))


def test_a_run_in_fp32_goes_on_with_all_its_bits(tmp_path):
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_on_train_epoch_end=True, save_top_k=-1, filename="{step}")
    fitted(net(optimizer=torch.optim.AdamW), "fp32", keep=keep, steps=3)
    wide = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    looks = Looks()
    fitted(net(), ckpt_path=tmp_path / "step=3.ckpt", keep=looks, on_policy_change="accept")
    assert same(looks.begun, wide)


def test_an_optimizer_that_loses_bits_is_told_of_once():
    with pytest.warns(UserWarning, match="store their weights in 16 bits") as told:
        fitted(net(optimizer=torch.optim.AdamW))
    (message,) = [str(each.message) for each in told if "16 bits" in str(each.message)]
    assert "lightning_mixprec.optim.AdamW or SGD" in message
    fitted(net())  # where a warning would be an error


def test_each_optimizer_that_loses_bits_is_told_of():
    class Two(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            made = (torch.optim.AdamW, self.first), (AdamW, self.third), (torch.optim.SGD, self.second)
            return [kind(layer.parameters(), lr=1e-2) for kind, layer in made]

    module = Two()
    module.third = torch.nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="store their weights in 16 bits") as told:
        fitted(module, {"default": "bf16", "first": "p=bf16", "second": "p=bf16"})
    messages = [str(each.message) for each in told if "16 bits" in str(each.message)]
    assert [message.split(":")[0] for message in messages] == [
        f"1 layers ({layer} first) store their weights in 16 bits and are trained by {name}"
        for layer, name in (("first", "AdamW"), ("second", "SGD"))
    ]


def test_a_skipped_step_moves_no_bit():
    """Of weights in fp16, under a loss scale that overflows their gradients at the first step."""
    policy = {"default": "fp16", "first": "p=fp16"}
    module, looks = net(), Looks()
    before = bits(module)
    trainer = fitted(
        module, policy, steps=1, keep=looks, loss_scaling=LossScaling(init_scale=2.0**40, max_scale=2.0**40)
    )
    assert trainer.precision_plugin.skipped_steps >= 1
    assert same(bits(module), before) == (trainer.global_step == 0)


@pytest.mark.parametrize("word", ["exact", "kahan"])
def test_a_checkpoint_file_alone_has_the_full_weights(tmp_path, word):
    class Kept(pl.Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                self.expected = fp32_state_dict(model, trainer.optimizers[0])

    kept = Kept()
    fitted(net(weights=word), keep=kept)
    assert same(full_weights(tmp_path / "half.ckpt"), kept.expected)


AVERAGING = {
    "ema": lambda: pl.callbacks.EMAWeightAveraging(decay=0.5),
    "mean": lambda: pl.callbacks.WeightAveraging(),
    "swa": lambda: pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1),
}


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_averages_of_rounded_weights_are_refused_before_training(kind, format):
    module = net()
    before = bits(module)
    with pytest.raises(
        SupportError, match=r"averages weights as they are stored, and 1 layers \('first' first\)"
    ) as told:
        fitted(module, {"default": "fp32", "first": f"p={format}"}, keep=AVERAGING[kind]())
    assert "\n" not in str(told.value)
    assert same(bits(module), before) and not module.seen
    fitted(net(), {"default": "bf16"}, keep=AVERAGING[kind]())  # stored in fp32
