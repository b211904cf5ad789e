"""Modules that keep or change what nobody expects: one small habit each, of which a generated model has several.

Each habit shows in what the layer computes, so that a replay that leaves a trace of it changes the training. The habits
in ``REFUSED`` cannot be replayed at all: a run that has one is told so once.
"""

import array
import contextvars
import functools
import random
import sys
import types
import weakref
from collections import OrderedDict, deque

import numpy as np
import torch
from lightnings import pl
from torch import nn

WIDTH = 4
REAL = {}
"""Weights that a step reaches past its module, by the module's ``id``."""


class Habit(nn.Module):
    """A layer whose output is scaled by what it has counted so far."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.keep()

    def keep(self):
        pass

    def count(self, x):
        return 0

    def forward(self, x):
        scale = 1 + 0.05 * float(self.count(x))
        return torch.tanh(self.linear(x)) * scale


class HooksInForward(Habit):
    def keep(self):
        self.is_ready = False

    def count(self, x):
        if not self.is_ready:
            self.linear.register_forward_hook(lambda module, args, out: 1.5 * out)
            self.is_ready = True
        return len(self.linear._forward_hooks)


class HookOnEachCall(Habit):
    def count(self, x):
        self.handle = self.register_forward_pre_hook(lambda module, args: None)
        return len(self._forward_pre_hooks)


class ReplacedBuffer(Habit):
    def keep(self):
        self.register_buffer("seen", torch.zeros(()))

    def count(self, x):
        self.seen = self.seen + 1
        return self.seen


class ResizedBuffer(Habit):
    def keep(self):
        self.register_buffer("rows", torch.zeros(0))

    def count(self, x):
        self.rows.resize_(self.rows.numel() + 1).fill_(1)
        return self.rows.sum()


class Workspace(Habit):
    def keep(self):
        self.latest = torch.zeros(0)

    def count(self, x):
        self.latest.resize_(len(self.latest) + 1).fill_(1)
        return self.latest.sum()


class WritesPastAutograd(Habit):
    def keep(self):
        self.bank = torch.zeros(64, 8)

    def count(self, x):
        self.bank.data[int(self.bank[0, 0]) % 64] += 1
        self.bank[0, 0] += 1
        return self.bank.sum() / 8


class Unclearable(dict):
    def clear(self):
        raise TypeError("frozen")

    update = pop = clear


class UnclearableDict(Habit):
    def keep(self):
        self.seen = Unclearable()

    def count(self, x):
        self.seen[len(self.seen)] = x.shape
        return len(self.seen)


class Slots:
    __slots__ = ("calls", "random")

    def __init__(self):
        self.calls, self.random = 0, random.Random(3)


class SlotsAndProxy(Habit):
    def keep(self):
        held = {"slots": Slots()}
        self.held = types.MappingProxyType(held)

    def count(self, x):
        self.held["slots"].calls += 1
        return self.held["slots"].calls + self.held["slots"].random.random()


class ReadOnly:
    def __init__(self):
        vars(self)["calls"] = 0

    def __setattr__(self, name, value):
        raise AttributeError("read-only")


class ReadOnlyObject(Habit):
    def keep(self):
        self.held = ReadOnly()

    def count(self, x):
        vars(self.held)["calls"] += 1
        return self.held.calls


class World:
    """An environment within others."""

    def __init__(self, depth):
        self.inner = World(depth - 1) if depth else None
        self.noise, self.steps, self.recent = np.random.default_rng(depth), 0, deque(maxlen=3)

    def step(self):
        self.steps += 1
        self.recent.append(self.noise.normal())
        return sum(self.recent) + (self.inner.step() if self.inner is not None else self.steps)


CALLS, WORLD, LEVEL = 0, World(2), contextvars.ContextVar("level", default=0)


class NestedObjects(Habit):
    def keep(self):
        self.world = World(5)

    def count(self, x):
        return self.world.step() / 10


class OwnGenerators(Habit):
    def keep(self):
        self.own = [torch.Generator().manual_seed(1), random.Random(1).random, np.random.RandomState(1)]

    def count(self, x):
        return torch.rand((), generator=self.own[0]) + self.own[1]() + self.own[2].rand()


class ClosureThatCounts(Habit):
    def keep(self):
        calls = 0

        def count():
            nonlocal calls
            calls += 1
            return calls

        self.calls = count

    def count(self, x):
        return self.calls()


class WeightsInContainers(Habit):
    def keep(self):
        weight = self.linear.weight
        self.pool = OrderedDict(a=(weight, [weight]))
        self.penalty = lambda: weight.square().mean()

    def count(self, x):
        with torch.no_grad():
            self.pool["a"][1][0].mul_(0.99)
        return 1

    def forward(self, x):
        return super().forward(x) + self.penalty()


def real():
    """``REAL``, by a name that nobody knows who has only read the code."""
    return vars(sys.modules[__name__])["RE" + "AL"]


class WeightsElsewhere(Habit):
    def keep(self):
        real()[id(self)] = self.linear.weight

    def count(self, x):
        with torch.no_grad():
            real()[id(self)].mul_(0.99)
        return 1


class WeakReference(Habit):
    def keep(self):
        self.reference = weakref.ref(self.linear.bias)

    def count(self, x):
        self.reference().data.mul_(0.9)
        return self.reference().detach().sum()


class GlobalVariable(Habit):
    def keep(self):
        global CALLS
        CALLS = 0

    def count(self, x):
        global CALLS
        CALLS += 1
        return CALLS


class GlobalObject(Habit):
    def keep(self):
        WORLD.__init__(2)

    def count(self, x):
        return WORLD.step() / 10


class ClassAttribute(Habit):
    calls, past = 0, array.array("d")

    def keep(self):
        type(self).calls = 0
        del self.past[:]

    def count(self, x):
        type(self).calls += 1
        self.past.append(self.calls)
        return sum(self.past)


class ContextVariable(Habit):
    def keep(self):
        LEVEL.set(0)

    def count(self, x):
        LEVEL.set(LEVEL.get() + 1)
        return LEVEL.get()


@functools.lru_cache
def cached_gain(size):
    return torch.rand(size)


class CachedFunction(Habit):
    def keep(self):
        cached_gain.cache_clear()

    def count(self, x):
        return cached_gain(len(x)).sum() / 8


class LooseLeaf(Habit):
    def keep(self):
        self.gain = torch.ones(WIDTH, requires_grad=True)

    def count(self, x):
        return 0 if self.gain.grad is None else self.gain.grad.norm().item()

    def forward(self, x):
        return super().forward(x) * self.gain


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1 + 0.05 * self.calls)


class Scripted(Habit):
    def keep(self):
        self.program = torch.jit.script(Program())

    def forward(self, x):
        return super().forward(x) + self.program(x)


class Growing(Habit):
    def keep(self):
        self.grown = nn.ModuleList()

    def count(self, x):
        self.grown.append(nn.Identity())
        self.add_module(f"more{len(self.grown)}", nn.Identity())
        return len(self._modules)


class ParametrizedInForward(Habit):
    def count(self, x):
        if type(self.linear) is nn.Linear:
            nn.utils.parametrize.register_parametrization(self.linear, "bias", nn.Tanh())
        return 1


class ChangesItsMode(Habit):
    def count(self, x):
        before = self.training
        self.train(not before)
        self.linear.bias.requires_grad_(True)
        return before


class ArrayOfItsOwn(Habit):
    def keep(self):
        self.table = np.zeros((64, 8))

    def count(self, x):
        self.table[int(self.table[0, 0]) % 64] += 1
        self.table[0, 0] += 1
        return self.table.sum() / 8


class ListIterator(Habit):
    def keep(self):
        self.stream = iter([0.1 * each for each in range(1000)])

    def count(self, x):
        return next(self.stream)


class Stream(Habit):
    def keep(self):
        self.stream = (0.1 * each for each in range(1000))

    def count(self, x):
        return next(self.stream)


class StreamThatIsHidden(Stream):
    def count(self, x):
        try:
            return next(self.stream)
        except ValueError:
            return 0


REFUSED = {"Stream", "StreamThatIsHidden"}
"""Not the habits that are refused at times: a weight that is reached past its module, an array that is large."""

HABITS = {kind.__name__: kind for kind in (*Habit.__subclasses__(), *Stream.__subclasses__())}


class OddModel(pl.LightningModule):
    """A chain of layers with habits, the last one inside another module, and what they computed.

    Args:
        names: The habits, from ``HABITS``.
    """

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(1)
        layers = [HABITS[name]() for name in names]
        self.net = nn.Sequential(*layers[:-1], nn.Sequential(layers[-1], nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        loose = [each.gain for each in self.net.modules() if isinstance(each, LooseLeaf)]
        return torch.optim.Adam([*self.parameters(), *loose], lr=0.05)
