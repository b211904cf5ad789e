"""Runs on sharded weights that a policy stores in 16 bits, and the same ones on one process."""

from exact_gradients import Summed, adamw
from lightnings import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 7), nn.Linear(4, 7)

    def forward(self, inputs):
        return self.first(inputs) + self.second(inputs)


class Uneven(Summed):
    """Seven outputs, of which one rank has four and the other three; sharded by the plugin where there are ranks."""

    STORED = "pair.first"

    def __init__(self, *args):
        super().__init__(*args)
        del self.first, self.second
        self.pair = Pair()

    def training_step(self, batch, batch_idx):
        self.seen.add(self.pair.first.weight.dtype)
        return (self.pair(batch[0]) * batch[1][:, :7]).sum()

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.pair.first.bias, DTensor):
            self.shard()

    def shard(self):
        self.trainer.precision_plugin.fully_shard(self, [self.pair])


class ByHand(Uneven):
    """Sharded by torch's function, each layer by itself."""

    def shard(self):
        for layer in (self.pair.first, self.pair.second):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Together(Uneven):
    """Sharded by torch's function, both layers together."""

    def shard(self):
        fully_shard(self.pair, mesh=self.device_mesh["data_parallel"])


def keeping(weights, states="fp32"):
    def configure(where, module):
        return where.AdamW(module.parameters(), lr=1e-2, weights=weights, states=states)

    return configure


def momentum(where, module):
    return where.SGD(module.parameters(), lr=1e-2, momentum=0.9, dampening=0.5)


def undamped(where, module):
    return where.SGD(module.parameters(), lr=1e-2, momentum=0.9)


CONFIGURED = {
    "exact": adamw,
    "sgd": momentum,
    "undamped": undamped,
    "kahan": keeping("kahan", "bf16"),
    "stochastic": keeping("stochastic", "bf16"),
}
