"""FSDP1 and FSDP2 on CUDA: one process with nccl."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from plugin_models import Batches
from sharded_models import Block, Sharded
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_mixprec import FidelityMonitor, PerLayerFSDPPrecision, PerLayerPrecision, UnderflowMonitor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning"),  # there is one process
    pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning"),
]

POLICIES = ["bf16", "fp16", {"default": "fp16", "model.blocks.*.norm": "c=fp32,o=input"}]


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def losses(strategy, plugin, callbacks=(), **model):
    torch.manual_seed(3)
    module = Sharded(**model)
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        strategy=strategy,
        plugins=plugin,
        callbacks=[*callbacks],
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(6, seed=7), Batches(6, seed=7))
    return module.losses, plugin.skipped_steps, plugin.scaler.get_scale()


@pytest.mark.parametrize("policy", POLICIES, ids=["bf16", "fp16", "norms"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, fused])
def test_one_rank_that_shards_computes_what_one_that_does_not_computes(policy, optimizer):
    expected = losses("auto", PerLayerPrecision(policy), optimizer=optimizer)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    found = losses(strategy, PerLayerPrecision(policy), optimizer=optimizer)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("policy", POLICIES, ids=["bf16", "fp16", "norms"])
def test_fsdp1_computes_what_one_device_computes(policy):
    expected = losses("auto", PerLayerPrecision(policy))
    strategy = FSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({Block}))
    found = losses(strategy, PerLayerFSDPPrecision(policy))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1:] == expected[1:]


def test_monitors_replay_what_is_sharded():
    monitors = [UnderflowMonitor(every_n_steps=2), FidelityMonitor(every_n_steps=2)]
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    losses(strategy, PerLayerPrecision("fp16"), monitors)
    assert monitors[0].latest and monitors[1].latest["layers"]
