"""A strategy is one row: one that Lightning does not have is planted, and all that is asked of it follows."""

import pytest
import torch
from lightnings import Strategy, pl
from plugin_models import Batches, Task, mlp

from lightning_mixprec import (
    MixPrecError,
    OverflowMonitor,
    PerLayerPrecision,
    PrecisionScheduler,
)
from lightning_mixprec.plugin import strategies
from lightning_mixprec.plugin.strategies import StrategyRow, data_parallel_mesh


class Toy(Strategy):
    """Trains on one device, and is none of those that there are."""

    root_device = torch.device("cpu")
    is_global_zero = True
    global_rank = local_rank = node_rank = 0
    world_size = 1

    def reduce(self, tensor, *args, **kwargs):
        return tensor

    def all_gather(self, tensor, group=None, sync_grads=False):
        return tensor

    def barrier(self, name=None):
        pass

    def broadcast(self, obj, src=0):
        return obj

    def model_to_device(self):
        self.model.to(self.root_device)

    @property
    def is_distributed(self):
        return False


@pytest.fixture
def plant(monkeypatch):
    """Adds a row for the toy strategy, with some of its fields."""

    def planted(**fields):
        row = StrategyRow("the toy", (Toy,), example="Trainer(strategy=Toy())", **fields)
        monkeypatch.setattr(strategies, "STRATEGIES", [row, *strategies.STRATEGIES])

    return planted


def fit(plugin, *callbacks, strategy=None):
    torch.manual_seed(0)
    model = Task(mlp())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy if strategy is not None else Toy(),
        plugins=plugin,
        callbacks=[*callbacks],
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Batches(6))
    return model.losses


def test_a_strategy_of_no_row_is_refused_and_the_error_lists_the_rows():
    with pytest.raises(MixPrecError, match="does not support Toy; supported are the single-device strategies, DDP"):
        fit(PerLayerPrecision("bf16"))


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_with_a_row_it_trains_as_on_a_single_device(plant, format):
    plant()
    monitor = OverflowMonitor()
    assert fit(PerLayerPrecision(format), monitor) == fit(PerLayerPrecision(format), strategy="auto")


def test_its_row_says_who_may_replay_and_the_scheduler_replays_nothing(plant):
    plant(why_no_replay=lambda strategy: f"{type(strategy).__name__} does not allow; use another one.")
    with pytest.raises(MixPrecError) as caught:
        fit(PerLayerPrecision("fp16"), OverflowMonitor())
    assert str(caught.value) == (
        "OverflowMonitor replays steps on each rank by itself, which Toy does not allow; use another one."
    )
    scheduler = PrecisionScheduler([{"at": 2, "policy": "fp32"}])
    fit(PerLayerPrecision("bf16"), scheduler)
    assert [each["step"] for each in scheduler.came] == [2]


@pytest.mark.parametrize("is_sharding", [False, True])
def test_its_row_says_whether_ranks_agree_on_each_step(plant, is_sharding):
    class AllSet(Exception):
        pass

    class Stops(pl.Callback):
        def on_train_start(self, trainer, model):
            raise AllSet

    plant(is_sharding=is_sharding)
    plugin = PerLayerPrecision("fp16")
    with pytest.raises(AllSet):
        fit(plugin, Stops())
    assert (plugin.scaler.shared_on is not None) is is_sharding


def test_its_row_says_over_what_it_shards(plant):
    plant(mesh=lambda strategy: "a mesh")
    assert data_parallel_mesh(Toy()) == "a mesh"


def test_its_row_says_which_plugin_it_takes(plant):
    plant(plugin="PerLayerFSDPPrecision", why_not=", which has a plugin of its own")
    with pytest.raises(MixPrecError, match="does not support Toy, which has a plugin of its own; supported are"):
        fit(PerLayerPrecision("bf16"))
    strategies.check_strategy(Toy(), "PerLayerFSDPPrecision")


def test_its_row_adds_it_to_what_is_supported(plant):
    plant()
    with pytest.raises(MixPrecError, match=r"supported are the toy, the single.*\(Trainer\(strategy=Toy\(\)\), "):
        strategies.check_strategy(object())
