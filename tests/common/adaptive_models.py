"""Models that fail in fp16 for a planted reason, whose remedy is known by construction, and runs that adapt to them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightnings import MixedPrecision, pl
from plugin_models import Task, trainer
from torch import Tensor, nn

from lightning_mixprec import PerLayerPrecision, PrecisionPlan
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.evidence.measuring.costs import measure_costs
from lightning_mixprec.evidence.step_window import StepWindow
from lightning_mixprec.optim import loss_scaling as scaling
from lightning_mixprec.planning.sensitivity import Offer, Sensitivities

ADAM = partial(torch.optim.Adam, lr=1e-2)


class Lessons:
    """Batches of a smooth function; a loader that can be resumed within an epoch."""

    def __init__(self, count: int = 40, size: int = 16, seed: int = 7, gain: float = 1.0, targets: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(6, targets, generator=generator)
        inputs = [torch.randn(size, 6, generator=generator) for _ in range(count)]
        self.batches: list[Any] = [(gain * x, torch.tanh(x @ teacher)) for x in inputs]
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        place, self.place = self.place, 0
        for number in range(place, len(self.batches)):
            self.given = number + 1
            yield self.batches[number]

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["given"] % len(self.batches)


# Networks from 6 features to 2


class Loud(nn.Module):
    """A feed-forward block whose output projection gives values of about 1e6, and a norm that takes them back."""

    def __init__(self, deviation: float = 3e5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)
        nn.init.normal_(self.down.weight, std=deviation)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.relu(self.up(x)))))


class Encoding(nn.Module):
    """Phases in the thousands, which are off by about one in fp16 and by more in bf16."""

    def __init__(self, frequency: float = 1000.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequency * torch.randn(6, 16, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.frequencies)


class Silent(nn.Module):
    """What it is to learn (see :func:`encoded`) can be learned from the true encoding alone."""

    def __init__(self, frequency: float = 1000.0) -> None:
        super().__init__()
        self.encode, self.body, self.head = Encoding(frequency), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.encode(x)))


def encoded(count: int = 60, frequency: float = 1000.0) -> "Lessons":
    """Batches whose targets are the first two numbers of the encoding."""
    lessons = Lessons(count)
    lessons.batches = [(x, Encoding(frequency)(x)[:, :2]) for x, _ in lessons.batches]
    return lessons


class Attending(nn.Module):
    """Attention over the batch, written into the forward, whose logits are beyond fp16 before they are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        logits = (300 * query) @ (300 * key).transpose(-2, -1) * 1e-5
        return self.head(logits.softmax(-1).to(value.dtype) @ value)


class Saturated(Task):
    """Learns to say yes from a confident no; the epsilon that keeps its loss finite is nothing in fp16."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
        super().__init__(net, partial(ADAM, lr=5e-2))
        nn.init.constant_(self.net[2].bias, -20.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = -torch.log(torch.sigmoid(self.net(batch[0])) + 1e-8).mean()
        self.losses.append(loss.detach().float().clone())
        return loss


def loud() -> Task:
    return Task(Loud(), ADAM)


def silent() -> Task:
    return Task(Silent(), partial(ADAM, lr=3e-2))


def solved() -> Task:
    """Knows already what :func:`encoded` is to teach it, so that in fp16 all that it learns is wrong."""
    module = Task(Silent(), partial(ADAM, lr=1e-3))
    with torch.no_grad():
        for layer in (module.net.body, module.net.head):
            nn.init.eye_(layer.weight)
            nn.init.constant_(layer.bias, 0.01)
    return module


def attending() -> Task:
    return Task(Attending(), ADAM)


# Runs


def stock() -> MixedPrecision:
    """Lightning's own fp16, with its own scale."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def train(
    make: Callable[[], pl.LightningModule],
    plugin: Any,
    callbacks: Sequence[pl.Callback] = (),
    batches: Any = None,
    **options: Any,
) -> tuple[Any, pl.Trainer]:
    """Trains a model that starts from the same weights every time."""
    torch.manual_seed(0)
    module, ckpt_path = make(), options.pop("ckpt_path", None)
    run = trainer(plugin, callbacks=[*callbacks], **options)
    run.fit(module, batches or Lessons(), ckpt_path=ckpt_path)
    return module, run


class Adapted(NamedTuple):
    """A run that adapted."""

    module: Any
    plugin: PerLayerPrecision
    adaptive: AdaptivePrecision
    trainer: pl.Trainer

    @property
    def moves(self) -> list[tuple[str, str, str]]:
        return [tuple(move) for decision in self.adaptive.decisions for move in decision["moves"]]

    @property
    def formats(self) -> dict[str, str]:
        return {name: layer.compute for name, layer in self.plugin.assignment.items()}

    @property
    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(value).all()) for value in self.module.state_dict().values())


def adapt(
    make: Callable[[], pl.LightningModule] = loud,
    adaptive: AdaptivePrecision | None = None,
    plugin: Any = "fp16",
    callbacks: Sequence[pl.Callback] = (),
    batches: Any = None,
    **options: Any,
) -> Adapted:
    """Trains under AdaptivePrecision."""
    plugin = plugin if isinstance(plugin, PerLayerPrecision) else PerLayerPrecision(plugin)
    adaptive = adaptive or AdaptivePrecision()
    module, run = train(make, plugin, [adaptive, *callbacks], batches, **options)
    return Adapted(module, plugin, adaptive, run)


def send_outcomes(patch: Any) -> None:
    """The CPU stands in for an accelerator, whose outcomes arrive in the next step; for fused optimizers."""
    patch.setattr(scaling, "_is_read", lambda optimizer, _: not scaling.obeys_found_inf(optimizer))
    patch.setattr(StepWindow, "is_late", True)


def late(losses: Sequence[Tensor]) -> float:
    """The mean of the last eight losses."""
    return sum(loss.item() for loss in losses[-8:]) / 8


# Plans, and batches that they suit or do not


def phases(*sizes: float, count: int = 24, seed: int = 7) -> Lessons:
    """Batches whose phases are in the thousands (1.0), or next to nothing, from one part of the run to the next."""
    lessons = Lessons(count, seed=seed)
    inputs = [x * sizes[number * len(sizes) // count] for number, (x, _) in enumerate(lessons.batches)]
    lessons.batches = [(x, Encoding()(x)[:, :2]) for x in inputs]
    return lessons


SAFE = {"": 1e-12, "net": 2e-12, "net.encode": 3e-12, "net.body": 4e-12, "net.head": 5e-12}


def planned(sensitivities: dict[str, float] = SAFE, budget: dict[str, float] | None = None) -> PrecisionPlan:
    """A plan from what is said of each layer; only the costs are looked up."""
    module = silent()
    offers = tuple({"fp32": Offer(0.0), "bf16": Offer(each)} for each in sensitivities.values())
    measured = Sensitivities(tuple((name,) for name in sensitivities), offers, "fp32", 1)
    costs = measure_costs(module, phases(1.0).batches[:1], ["bf16"], device="h100")
    return PrecisionPlan.of(module, measured, costs, ["bf16"], budget)
