"""What one of two processes does in test_sharded_replay.py: runs with monitors and without, and saves the outcomes."""

import math
import sys
import warnings
from pathlib import Path

import torch
from fsdp2_script import RANK, outcome, sharded, train
from lightning.pytorch.callbacks import Callback
from plugin_models import Batches
from sharded_models import ByHand, Recomputing, Sharded
from torch import distributed, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from live_bytes import LiveBytes  # noqa: E402

from lightning_mixprec import FidelityMonitor, PerLayerPrecision, UnderflowMonitor
from lightning_mixprec.numerics.exponents import histogram
from lightning_mixprec.numerics.rates import headroom, underflow_rate

NORMS = {"default": "fp16", "model.blocks.*.norm": "c=fp32,o=input"}
OF_LAYERS = [
    "model.stem",
    "model.head",
    *(f"model.blocks.{n}.{part}" for n in (0, 1) for part in ("norm", "up", "down")),
]


class Busy(Sharded):
    """Draws random numbers, counts, and keeps statistics in a buffer."""

    def __init__(self):
        super().__init__()
        self.norm, self.seen = nn.BatchNorm1d(2, affine=False), [0]

    def loss(self, batch):
        self.seen[0] += 1
        return F.mse_loss(self.norm(F.dropout(self.model(batch[0]))), batch[1])


class Waiting(Sharded):
    """Two backward passes, of which the first's gradients wait, unreduced, until the second's have come."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, is_last = self.optimizers(), batch_idx % 2 == 1
        self.model.set_requires_gradient_sync(is_last)
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.losses.append(loss.item())
        if is_last:
            optimizer.step()
            optimizer.zero_grad()


class Clipping(Sharded):
    """Clips its weights in the step, as a critic does."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.model.stem.weight.clamp_(-0.2, 0.2)
            self.model.head.bias.mul_(0.9)
        return super().training_step(batch, batch_idx)


class FailsInFp32(Sharded):
    """On one rank alone its step, in no layer, fails in fp32, at the second batch."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if RANK == 1 and batch_idx == 1 and not torch.is_autocast_enabled("cpu"):
            raise ValueError("fp32 is not for me")
        self.losses.append(loss.item())
        return loss


class Observed(Callback):
    """Notes generators, buffers and attributes after each batch, and the gradients that wait."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        buffers = [buffer.clone() for buffer in model.buffers()]
        self.seen.append([torch.get_rng_state(), *buffers, torch.tensor(getattr(model, "seen", [0]))])


def both_ways(policy, model=None, **options):
    """A run without monitors, and one whose every batch is replayed."""
    found = {}
    for name, monitors in (("plain", []), ("watched", [UnderflowMonitor(1), FidelityMonitor(1)])):
        observed = Observed()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = outcome(
                sharded(), PerLayerPrecision(policy), [*monitors, observed], model=model, **{"max_epochs": 1} | options
            )
        found[name] = {what: run[what] for what in ("losses", "evaluated", "weights", "scale", "skipped", "stored")}
        found[name]["seen"] = observed.seen
        found[name]["said"] = [str(each.message) for each in caught if "could not sample" in str(each.message)]
        found[name]["sampled"] = [len(monitor.latest["layers"]) for monitor in monitors[1:]]
    return found


def of_the_global_batch():
    """What monitors say of the first step, and the same by hand: gradients averaged over ranks, whole."""
    options = {"max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    monitors = [UnderflowMonitor(1, max_elements=10**6), FidelityMonitor(1)]
    outcome(sharded(), PerLayerPrecision("bf16", emulate=False), monitors, **options)
    gradients = {}
    for name in ("bf16", "fp32"):
        torch.manual_seed(3)
        model = Sharded()
        batch = Batches(6, seed=7 + RANK).batches[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            loss = F.mse_loss(model.model(batch[0]), batch[1])
        loss.backward()
        for param in model.parameters():
            distributed.all_reduce(param.grad)
            param.grad /= 2
        layers = {layer: model.get_submodule(layer).parameters() for layer in OF_LAYERS}
        gradients[name] = {layer: torch.cat([p.grad.flatten() for p in params]) for layer, params in layers.items()}
    by_hand = {}
    for layer, wide in gradients["fp32"].items():
        low, seen = gradients["bf16"][layer].double(), histogram(wide)
        by_hand[layer] = {
            "grad_cosine": F.cosine_similarity(low, wide.double(), dim=0).item(),
            "headroom_bits": headroom(seen, "bf16", direction="backward"),
            "fp8": underflow_rate(seen, "fp8", direction="backward").middle,
        }
    told = {layer: monitors[1].latest["layers"][layer] for layer in OF_LAYERS}
    for layer in OF_LAYERS:
        lost = monitors[0].latest[layer]
        told[layer] = told[layer] | {
            "headroom_bits": lost["headroom_bits"],
            "fp8": lost["what_if"]["fp8"]["underflow_rate"],
        }
    return {"told": told, "by hand": by_hand}


class Wide(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.parts = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(depth))
        )

    def forward(self, x):
        return self.parts(x)


class Large(Sharded):
    """Large weights and small activations."""

    def __init__(self, width=256, depth=8):
        super().__init__(optimizer=torch.optim.SGD)
        self.model = Wide(width, depth)

    def configure_model(self):
        self.trainer.precision_plugin.fully_shard(self, [*self.model.parts, self.model])

    def loss(self, batch):
        return self.model(batch[0].repeat(1, 64)[:, :256]).square().mean()


def live_bytes(policy):
    """Peaks of live bytes over ordinary steps and over sampled ones, and the bytes of all weights and of a group."""
    peaks, options = {}, {"num_sanity_val_steps": 0, "limit_val_batches": 0, "max_epochs": 1, "limit_train_batches": 3}
    for name, monitors in (("ordinary", []), ("sampled", [UnderflowMonitor(2, max_elements=256), FidelityMonitor(2)])):
        with LiveBytes() as live:
            _, model = train(sharded(), PerLayerPrecision(policy), monitors, model=Large, **options)
        peaks[name] = live.peak
    numbers = sum(weight.numel() for weight in model.parameters())
    return peaks | {"weights": 4 * numbers, "group": 4 * numbers // 8}


def main(folder):
    results = {
        "norms": both_ways(NORMS, max_epochs=2),
        "busy": both_ways("bf16", Busy),
        "accumulated": both_ways("fp16", accumulate_grad_batches=2, gradient_clip_val=0.5),
        "waiting": both_ways("bf16", Waiting),
        "by hand": both_ways(NORMS, ByHand),
        "recomputed": both_ways(NORMS, Recomputing),
        "clipping": both_ways("bf16", Clipping),
        "fails": both_ways("bf16", FailsInFp32),
        "global": of_the_global_batch(),
        "bytes fp32": live_bytes("fp32"),
        "bytes bf16": live_bytes("bf16"),
    }
    assert all(math.isfinite(loss) for loss in results["busy"]["plain"]["losses"])
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
