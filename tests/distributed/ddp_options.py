"""What one of two processes does in test_ddp_options.py: DDP's own options and hooks."""

import sys
from functools import partial
from pathlib import Path

import torch
from ddp_cases import MIXED, RANK, data, gloo, trained
from plugin_models import Task, ours, stock
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, UnderflowMonitor

COUNTS: list[int] = []


def counting(state, bucket):
    """Counts the messages, and sends them as DDP does."""
    COUNTS[-1] += 1
    return default_hooks.allreduce_hook(state, bucket)


def counted(plugin, **options):
    COUNTS.append(0)
    result = trained(plugin, strategy=gloo(ddp_comm_hook=counting), **options)
    return result | {"messages": COUNTS[-1]}


class Branching(Task):
    """Has a branch that no step uses, and one that the ranks use in turn."""

    def __init__(self, *args):
        super().__init__(*args)
        self.spare, self.alternate = nn.Linear(6, 2), nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = nn.functional.mse_loss(self.alternate(out) if batch_idx % 2 == RANK else out, batch[1])
        self.losses.append(loss.detach().clone())
        return loss


class Sharded(Task):
    """The optimizer's state is shared out among the ranks."""

    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.parameters(), SGD, lr=0.05, momentum=0.9)


class Beside(Task):
    """A layer whose gradients are within fp32 and, times the loss scale, beyond fp16."""

    def __init__(self, *args):
        super().__init__(*args)
        self.beside = nn.Linear(6, 2, bias=False)
        nn.init.zeros_(self.beside.weight)

    def forward(self, x):
        return self.net(x) + (100.0 if RANK == 0 else 0.0) * self.beside(x)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1e-6)


def watchers():
    return [OverflowMonitor(), UnderflowMonitor(2), FidelityMonitor(2), AdaptivePrecision(every_n_steps=2)]


def power():
    """PowerSGD of rank 1, from the third step on."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    return gloo(ddp_comm_state=state, ddp_comm_hook=powerSGD_hook.powerSGD_hook)


HOOKS = {
    "fp16 hook": lambda: gloo(ddp_comm_hook=default_hooks.fp16_compress_hook),
    "bf16 hook": lambda: gloo(ddp_comm_hook=default_hooks.bf16_compress_hook),
    "PowerSGD": power,
}
SAME_AS_PLAIN = {
    "static graph": lambda: {"strategy": gloo(static_graph=True)},
    "bucket views": lambda: {"strategy": gloo(gradient_as_bucket_view=True)},
    "sharded": lambda: {"kind": Sharded},
}
PLUGINS = {"stock": partial(stock, "fp16"), "ours": partial(ours, "fp16"), "mixed": partial(ours, MIXED)}


def modes():
    """Each option under Lightning's own plugin, under this one, and under a mixed policy."""
    for name, plugin in PLUGINS.items():
        turned = partial(ours, MIXED | {"alternate": "bf16", "spare": "fp32"}) if name == "mixed" else plugin
        yield f"plain, {name}", trained(plugin())
        yield f"unused, {name}", trained(turned(), Branching, strategy=gloo(find_unused_parameters=True))
        yield f"accumulating, {name}", counted(plugin(), accumulate_grad_batches=2)
        for hook, strategy in HOOKS.items():
            yield f"{hook}, {name}", trained(plugin(), strategy=strategy())
        for option, made in SAME_AS_PLAIN.items() if name != "stock" else ():
            yield f"{option}, {name}", trained(plugin(), **made())


def overflows():
    """The third batch of the first rank is infinite."""
    options = SAME_AS_PLAIN | {hook: lambda made=made: {"strategy": made()} for hook, made in HOOKS.items()}
    options["unused"] = lambda: {"strategy": gloo(find_unused_parameters=True), "kind": Branching}
    options["accumulating"] = lambda: {"accumulate_grad_batches": 2}
    for name, made in options.items():
        yield f"spoiled, {name}", trained(ours(MIXED), batches=data(spoiled=2), callbacks=watchers(), **made())


def compressed(folder):
    """What one layer sends is too large for fp16 at the first loss scales."""
    for name, hook in {"none": None, "fp16": HOOKS["fp16 hook"], "bf16": HOOKS["bf16 hook"]}.items():
        monitor, plugin = OverflowMonitor(), ours({"default": "fp32", "net": "fp16"})
        options = {"strategy": hook and hook(), "batches": data(count=8), "default_root_dir": folder}
        result = trained(plugin, Beside, callbacks=[monitor, *watchers()[1:]], **options)
        yield f"compressed, {name}", result | {"reasons": monitor.reasons}


def main(folder):
    results = dict(modes()) | dict(overflows()) | dict(compressed(folder))
    results["watched"] = counted(ours(MIXED), accumulate_grad_batches=2, callbacks=watchers(), default_root_dir=folder)
    torch.save(results, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
