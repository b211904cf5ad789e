"""A compiled model inside DDP, whose buckets Dynamo splits graphs by."""

import os

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from plugin_models import same
from selection import slow_but_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

POLICY = {"default": "fp16", "**.norm": "c=fp32,o=input", "net.blocks.1": "bf16", "net.head": "fp32"}


@pytest.fixture(autouse=True)
def _leave_the_process_group():
    before = dict(os.environ)
    yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def distributed():
    return DDPStrategy(process_group_backend="gloo", bucket_cap_mb=1e-4)


@pytest.mark.parametrize(
    "how",
    slow_but_for({"a submodule"}, ["the LightningModule", "the LightningModule in place", "a submodule", "each block"]),
)
def test_graphs_that_are_split_inside_regions_compute_what_the_plain_run_computes(how, run, monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64)
    plain = run(POLICY)
    done = run(POLICY, how, backend="aot_eager", strategy=distributed())
    assert type(done.trainer.strategy) is DDPStrategy
    assert how == "each block" or done.compiled_at[0] > 1
    assert same(done.numbers, plain.numbers)
