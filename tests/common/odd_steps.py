"""Training steps of every style that people write, and what each of them stepped with.

Each is the body of a ``training_step`` in manual optimization: a function of the module and the batch. What takes part
in it is one of the optimizers below, of which some move weights by methods of their own.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightnings import pl
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR, SequentialLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook

Step = Callable[[Any, Any], Any]


class Sharp(Optimizer):
    """Climbs to a worse place nearby, takes the gradient there, and steps from where it was by a base optimizer."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.base = SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    def _own(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        size = torch.stack([p.grad.norm() for p in self._own()]).norm()
        for p in self._own():
            self.state[p]["start"] = p.clone()
            p.add_(p.grad * (0.05 / (size + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self._own():
            p.copy_(self.state[p]["start"])
        self.base.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("call first_step and second_step")


class Slow(SGD):
    """Goes back half of the way to slow weights when it is asked to."""

    pulls = 1

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.pulls = 0

    @torch.no_grad()
    def update_lookahead(self) -> None:
        self.pulls += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                slow.lerp_(p, 0.5)
                p.copy_(slow)

    def step_and_pull(self) -> None:
        super().step()
        self.zero_grad()
        self.update_lookahead()


class Surgery:
    """Gradients of several tasks, projected until none contradicts another; no optimizer itself, it holds one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optim = optimizer

    def backward(self, module: Any, losses: list[Tensor]) -> None:
        own = [p for group in self._optim.param_groups for p in group["params"]]
        flat = []
        for loss in losses:
            self._optim.zero_grad()
            module.manual_backward(loss, retain_graph=True)
            flat.append(torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in own]))
        total = torch.zeros_like(flat[0])
        for first in flat:
            kept = first.clone()
            for other in flat:
                kept -= torch.minimum((kept * other).sum(), torch.zeros(())) / (other * other).sum() * other
            total += kept
        for p, part in zip(own, total.split([p.numel() for p in own]), strict=True):
            p.grad = part.view_as(p).clone()

    def step(self) -> None:
        self._optim.step()


class Odd(pl.LightningModule):
    """Two heads on a trunk, trained by a step of somebody's style."""

    def __init__(self, step: Step, configure: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
        self._step, self._configure = step, configure

    def losses(self, batch: Any) -> list[Tensor]:
        x, y = batch
        h = self.trunk(x)
        return [mse_loss(head(h).float(), y[:, place : place + 1]) for place, head in enumerate(self.heads)]

    def loss(self, batch: Any) -> Tensor:
        first, second = self.losses(batch)
        return first + 0.5 * second

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._step(self, batch)

    def configure_optimizers(self) -> Any:
        return self._configure(self)


def adam(module: Any) -> Any:
    return Adam(module.parameters(), lr=0.01)


def two(module: Any) -> Any:
    return [SGD(module.trunk.parameters(), lr=0.05, momentum=0.9), Adam(module.heads.parameters(), lr=0.01)]


def scheduled(module: Any) -> Any:
    optimizer = adam(module)
    parts = [LinearLR(optimizer, 0.5, total_iters=2), StepLR(optimizer, 1, gamma=0.5)]
    return [optimizer], [SequentialLR(optimizer, parts, milestones=[2])]


def kept(module: Any) -> Any:
    module.own = adam(module)
    return module.own


def held(module: Any) -> Any:
    module.surgery = Surgery(adam(module))
    return module.surgery._optim


def plain(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(module.loss(batch))
    optimizer.step()


def closure(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = module.loss(batch)
        module.manual_backward(loss)
        return loss

    optimizer.step(closure=evaluate)


def by_halves(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    for half in (slice(0, 2), slice(2, 4)):
        module.manual_backward(module.loss([part[half] for part in batch]) / 2)
    optimizer.step()
    optimizer.zero_grad()


def every_second_batch(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    module.manual_backward(module.loss(batch) / 2)
    module.batches = getattr(module, "batches", 0) + 1
    if module.batches % 2 == 0:
        optimizer.step()
        optimizer.zero_grad()


def in_turn(module: Any, batch: Any) -> None:
    for optimizer in module.optimizers():
        module.toggle_optimizer(optimizer)
        module.manual_backward(module.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
        module.untoggle_optimizer(optimizer)


def both_at_once(module: Any, batch: Any) -> None:
    trunk, heads = module.optimizers()
    trunk.zero_grad(), heads.zero_grad()
    module.manual_backward(module.loss(batch))
    trunk.step(), heads.step()


def toggled_by_context(module: Any, batch: Any) -> None:
    for optimizer in module.optimizers():
        with optimizer.toggle_model():
            optimizer.zero_grad()
            module.manual_backward(module.loss(batch))
            optimizer.step()


def surgery_on_groups(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    Surgery(optimizer).backward(module, module.losses(batch))
    optimizer.step()


def surgery_in_fp16(module: Any, batch: Any) -> None:
    """Products of gradients, which are beyond fp16 while losses are multiplied by much."""
    optimizer = module.optimizers()
    plain_gradients, own = [], [p for group in optimizer.param_groups for p in group["params"]]
    for loss in module.losses(batch):
        optimizer.zero_grad()
        module.manual_backward(loss / 100, retain_graph=True)
        plain_gradients.append(torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in own]))
    first, second = plain_gradients
    share = ((first @ second) / (second @ second)).float()
    for p, part in zip(own, (first - share * second).split([p.numel() for p in own]), strict=True):
        p.grad = part.view_as(p).clone()
    optimizer.step()


def surgery_held(module: Any, batch: Any) -> None:
    module.surgery.backward(module, module.losses(batch))
    module.optimizers().step()


def sharp(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    module.manual_backward(module.loss(batch))
    optimizer.first_step()
    torch.clear_autocast_cache()  # the weights moved without anybody's knowing
    module.manual_backward(module.loss(batch))
    optimizer.second_step()


def lookahead(module: Any, batch: Any) -> None:
    plain(module, batch)
    module.optimizers().update_lookahead()


def own_step(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    module.manual_backward(module.loss(batch))
    optimizer.step_and_pull()


def attribute(module: Any, batch: Any) -> None:
    module.own.zero_grad()
    module.manual_backward(module.loss(batch))
    module.own.step()


def of_the_trainer(module: Any, batch: Any) -> None:
    (optimizer,) = module.trainer.optimizers
    optimizer.zero_grad()
    module.manual_backward(module.loss(batch))
    optimizer.step()


def rates_by_hand(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    known = [len(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.9 * group["lr"] + 1e-4 * sum(known)
    plain(module, batch)


def with_schedule(module: Any, batch: Any) -> None:
    plain(module, batch)
    schedule = module.lr_schedulers()
    schedule.step()
    module.rates = [*getattr(module, "rates", []), *schedule.get_last_lr()]


def gradient_penalty(module: Any, batch: Any) -> None:
    optimizer, x = module.optimizers(), batch[0].clone().requires_grad_()
    optimizer.zero_grad()
    loss = module.loss((x, batch[1]))
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    module.manual_backward(loss + slope.float().square().sum())
    optimizer.step()


def towards_a_copy(module: Any, batch: Any) -> None:
    """The trunk and a deep copy of it, whose outputs it is to have, as target networks have them."""
    optimizer = module.optimizers()
    optimizer.zero_grad()
    target = copy.deepcopy(module.trunk).requires_grad_(False)
    loss = module.loss(batch) + mse_loss(module.trunk(batch[0]).float(), target(batch[0] + 0.1).float())
    module.manual_backward(loss)
    optimizer.step()


THROUGH_THE_PLUGIN: dict[str, tuple[Step, Callable[[Any], Any]]] = {
    "one optimizer": (plain, adam),
    "a closure": (closure, adam),
    "two backwards": (by_halves, adam),
    "every second batch": (every_second_batch, adam),
    "optimizers in turn": (in_turn, two),
    "optimizers at once": (both_at_once, two),
    "toggle_model": (toggled_by_context, two),
    "surgery on groups": (surgery_on_groups, adam),
    "surgery by an object": (surgery_held, held),
    "lookahead": (lookahead, lambda module: Slow(module.parameters())),
    "rates by hand": (rates_by_hand, adam),
    "schedules in a row": (with_schedule, scheduled),
    "gradient penalty": (gradient_penalty, adam),
    "a copy of a part": (towards_a_copy, adam),
}
PAST_THE_PLUGIN: dict[str, tuple[Step, Callable[[Any], Any]]] = {
    "sharpness in two steps": (sharp, lambda module: Sharp(module.parameters())),
    "a step of its own": (own_step, lambda module: Slow(module.parameters())),
    "an attribute": (attribute, kept),
    "the Trainer's": (of_the_trainer, adam),
}
ODD_STEPS = {**THROUGH_THE_PLUGIN, **PAST_THE_PLUGIN}


def odd(name: str) -> Odd:
    return Odd(surgery_in_fp16, adam) if name == "surgery in fp16" else Odd(*ODD_STEPS[name])


# Steps that nobody wrote: operations in any order, and a step at the end.


def _backward(module: Any, optimizer: Any, batch: Any) -> None:
    module.manual_backward(module.loss(batch))


def _backward_of_one(module: Any, optimizer: Any, batch: Any) -> None:
    module.manual_backward(module.losses(batch)[1])


def _zero(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()


def _edit_gradients(module: Any, optimizer: Any, batch: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad = p.grad.sign() * p.grad.square() + 0.01 * torch.randn(p.shape)


def _clip(module: Any, optimizer: Any, batch: Any) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)


def _climb(module: Any, optimizer: Any, batch: Any) -> None:
    own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    with torch.no_grad():
        before = [p.clone() for p in own]
        for p in own:
            p.add_(p.grad, alpha=0.1)
        torch.clear_autocast_cache()
    _backward(module, optimizer, batch)
    with torch.no_grad():
        for p, start in zip(own, before, strict=True):
            p.copy_(start)
        torch.clear_autocast_cache()


def _pull(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.update_lookahead()
    torch.clear_autocast_cache()


def _change_rates(module: Any, optimizer: Any, batch: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = 0.9 * group["lr"], 0.5
    module.lr_schedulers().step()


def _write_to_batch(module: Any, optimizer: Any, batch: Any) -> None:
    batch[0].mul_(1 + 0.1 * torch.rand(()))


def _toggle(module: Any, optimizer: Any, batch: Any) -> None:
    module.toggle_optimizer(optimizer)
    _backward_of_one(module, optimizer, batch)
    module.untoggle_optimizer(optimizer)


_OPERATIONS = (_backward, _backward_of_one, _zero, _edit_gradients, _clip, _climb, _pull, _change_rates, _toggle)
_OPERATIONS += (_write_to_batch,)


def _slow_and_scheduled(module: Any) -> Any:
    optimizer = Slow(module.parameters())
    return [optimizer], [StepLR(optimizer, 2, gamma=0.5)]


def drawn(seed: int) -> Odd:
    """A module whose step is drawn: some of the operations in some order, a backward, and the optimizer's step."""
    draw = random.Random(seed)
    operations = [draw.choice(_OPERATIONS) for _ in range(draw.randint(1, 8))]

    def step(module: Any, batch: Any) -> None:
        optimizer, own = module.optimizers(), [part.clone() for part in batch]
        optimizer.zero_grad()
        for operate in (*operations, _backward):
            operate(module, optimizer, own)
        optimizer.step()

    return Odd(step, _slow_and_scheduled)


@contextmanager
def stepped_with(module: Any) -> Iterator[dict[str, Tensor]]:
    """By name, the gradients of a module's parameters at the last step of an optimizer, read by a hook of torch's."""
    names, found = {id(param): name for name, param in module.named_parameters()}, {}

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None and id(param) in names:
                    found[names[id(param)]] = param.grad.detach().clone()

    handle = register_optimizer_step_post_hook(note)
    try:
        yield found
    finally:
        handle.remove()


SGD([torch.zeros(1)])  # torch has a class's step call hooks once an object of the class was made
