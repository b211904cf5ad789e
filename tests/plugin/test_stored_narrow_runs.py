"""Runs of every kind on weights stored in 16 bits against stock Lightning and torch on fp32 weights, bit for bit."""

import pytest
import torch
from exact_gradients import EPOCH, STOCK, Summed, adamw, batches, outcome, ran
from lightnings import pl
from plugin_models import same
from torch.nn.utils import prune

from lightning_mixprec.optim import full_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*mid-epoch checkpoint"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
]
FORMATS = ["bf16", "fp16"]


def in_fp32(where, module):
    """Gradients of weights in 16 bits accumulate in fp32, as those of fp32 weights do."""
    options = {} if where is STOCK else {"grad_dtype": torch.float32}
    return where.AdamW(module.parameters(), lr=1e-2, **options)


def fused(where, module):
    return where.AdamW(module.parameters(), lr=1e-2, fused=True)


def momentum(where, module):
    return where.SGD(module.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)


def scheduled(where, module):
    optimizer = where.AdamW(module.parameters(), lr=torch.tensor(1e-2), foreach=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3 * EPOCH)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByHand(Summed):
    """Two optimizers that step in turn, the second one every other time."""

    def __init__(self, where, configure, data):
        super().__init__(where, configure, data)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for number, optimizer in enumerate(self.optimizers()):
            if batch_idx % (number + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self):
        return [
            self.where.AdamW(self.first.parameters(), lr=1e-2),
            self.where.SGD([{"params": self.second.parameters()}], lr=1e-2, momentum=0.9),
        ]


class Thawing(Summed):
    """The first layer's weight, which the optimizer has, is trained in the second epoch alone."""

    def on_train_epoch_start(self):
        self.first.weight.requires_grad_(self.current_epoch == 1)


class Unfreezes(pl.callbacks.BaseFinetuning):
    """The first layer is added to the optimizer with the second epoch."""

    def freeze_before_training(self, module):
        self.freeze(module.first)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.first, optimizer)


class Grows(Summed):
    """The first layer's bias begins to be trained in the second epoch, in a group of its own."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.optimizers().optimizer.add_param_group({"params": [self.first.bias], "lr": 0.1})


class Prunes(pl.Callback):
    """Half of the first layer's weights are masked from the second epoch on, and 0 in the end."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            mask = torch.arange(32).view(8, 4) % 2
            prune.custom_from_mask(module.first, "weight", mask)

    def on_train_end(self, trainer, module):
        prune.remove(module.first, "weight")


RUNS = {
    "AdamW": {},
    "fused": {"configure": fused},
    "SGD": {"configure": momentum},
    "clipped by value": {"gradient_clip_val": 1.5, "gradient_clip_algorithm": "value"},
    "clipped by norm": {"configure": in_fp32, "gradient_clip_val": 1.5},
    "accumulated": {"accumulate_grad_batches": 2},
    "schedule and rate as tensors": {"configure": scheduled},
    "two optimizers by hand": {"module": ByHand},
    "frozen for a while": {"module": Thawing},
    "unfrozen and added": {"callbacks": lambda: [Unfreezes()]},
    "added in the run": {
        "module": Grows,
        "configure": lambda where, module: where.AdamW([module.first.weight, *module.second.parameters()], lr=1e-2),
    },
    "pruned": {"callbacks": lambda: [Prunes()]},
}


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("kind", RUNS)
def test_the_run_is_that_on_fp32_weights(kind, stored):
    expected = outcome(*ran(**RUNS[kind]))
    assert same(outcome(*ran(stored, **RUNS[kind])), expected)


SKIPPING = {
    "AdamW": adamw,
    "fused": fused,
    "SGD": momentum,
    "scheduled": scheduled,
}


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("scale", [False, 64.0])
@pytest.mark.parametrize("kind", SKIPPING)
def test_skipped_steps_are_none(kind, scale, stored):
    """The run is that without the batches that were spoiled: weights, lost bits, moments and counters."""
    configure, data = SKIPPING[kind], batches(6)
    kept = [batch for number, batch in enumerate(data) if number not in (0, 3)]
    expected = outcome(*ran(configure=configure, data=kept))
    trainer, module = ran(stored, configure=configure, data=batches(6, spoiled=(0, 3)), plugin={"loss_scaling": scale})
    assert trainer.precision_plugin.skipped_steps == 6
    assert same(outcome(trainer, module), expected)


class Saves(pl.Callback):
    """Saves after a batch of the second epoch."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, self.batch):
            trainer.save_checkpoint(self.path)


def stock_adamw(_, module):
    return adamw(STOCK, module)


BACK = {
    "under the plugin": {"stored": "fp32", "configure": stock_adamw, "plugin": {"on_policy_change": "accept"}},
    "without us": {},
}


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("back", BACK)
def test_from_stock_to_ours_and_back_nothing_is_lost(back, stored, tmp_path):
    """Without the plugin, what ``full_weights`` makes of the file goes into it."""

    def saved_after(epochs, *where, **options):
        keep = pl.callbacks.ModelCheckpoint(tmp_path / str(epochs), filename="end")
        ran(*where, max_epochs=epochs, callbacks=lambda: [keep], enable_checkpointing=True, **options)
        return tmp_path / str(epochs) / "end.ckpt"

    expected = outcome(*ran())
    path = saved_after(2, stored, ckpt_path=saved_after(1))
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"]["first.weight"].dtype != torch.float32
    if not BACK[back]:
        saved["state_dict"] = full_weights(path)
        torch.save(saved, path)
    assert same(outcome(*ran(ckpt_path=path, **BACK[back])), expected)


RESUMED = {"between steps": ({}, 1), "inside accumulation": ({"accumulate_grad_batches": 2}, 2)}


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_is_lightnings_resumed_run(kind, stored, tmp_path):
    """Which begins an accumulation anew that was cut short."""
    options, batch = RESUMED[kind]
    ends = []
    for each in (None, stored):
        path = tmp_path / f"{each}.ckpt"
        ran(each, callbacks=lambda path=path: [Saves(path, batch)], **options)
        ends.append(outcome(*ran(each, ckpt_path=path, **options)))
    assert same(*ends)
