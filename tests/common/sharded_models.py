"""Models that shard themselves with FSDP2 where their Trainer does, for tests under several strategies."""

import torch
from lightnings import ModelParallelStrategy, pl
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.formats, self.divisor = set(), 1.0

    def forward(self, x):
        hidden = self.up(self.norm(x))
        self.formats.add((str(self.up.weight.dtype), str(hidden.dtype)))
        return x + self.down(F.gelu(hidden)) / self.divisor


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(6, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 2)
        self.recomputes = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return self.head(x)


class Sharded(pl.LightningModule):
    """Shards its blocks and the whole if its Trainer shards at all."""

    def __init__(self, own_policy=None, optimizer=torch.optim.AdamW):
        super().__init__()
        self.model, self.own_policy, self.optimizer = Stack(), own_policy, optimizer
        self.losses, self.evaluated = [], []

    def configure_model(self):
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) or isinstance(self.model, FSDPModule):
            return
        parts = [*self.model.blocks, self.model]
        if self.own_policy is None:
            self.trainer.precision_plugin.fully_shard(self, parts)
        else:
            for part in (self.model.stem, self.model.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"], mp_policy=self.own_policy)
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        return F.mse_loss(self.model(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(self.loss(batch).item())

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


class Recomputing(Sharded):
    """Its blocks are recomputed in backward (activation checkpointing)."""

    def __init__(self):
        super().__init__()
        self.model.recomputes = True


class Split(Sharded):
    """Tensor parallelism: the two ranks hold halves of the blocks' layers and see the same batches."""

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for block in self.model.blocks:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)


class SplitAndSharded(Split):
    """Tensor parallelism first, then FSDP2 over the ranks that are left, here one."""

    def configure_model(self):
        super().configure_model()
        self.trainer.precision_plugin.fully_shard(self, [*self.model.blocks, self.model])


class ByHand(Sharded):
    """The same in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()
        self.losses.append(loss.item())


class Steep(Sharded):
    """Its gradients fit fp16 at loss scales below 1 alone, and no other number overflows."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.model.blocks[0].up.weight.mul_(3e4)
            self.model.blocks[0].down.weight.mul_(1e-4)


class Hot(Sharded):
    """One layer of the first block overflows in fp16, at every loss scale."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.model.blocks[0].down.weight.mul_(1e7)
        self.model.blocks[0].divisor = 1e7
