"""What a layer of another format writes into the objects it is called with is in the caller's when it has returned."""

from collections import OrderedDict, UserDict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

HALF = torch.float16


class Cache:
    """Keys that are appended, keys in a fixed place, and a count of both."""

    def __init__(self):
        self.keys = [torch.ones(1, 2, dtype=HALF)]
        self.static = torch.zeros(2, 2, dtype=HALF)
        self.count = 0

    def update(self, key):
        self.keys.append(key)
        self.static[self.count] = key.detach()[0]
        self.count += 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(2, 2)

    def forward(self, x, cache):
        cache.update(self.key(x))
        self.seen = [*cache.keys[:1], cache.static]
        return sum(cache.keys), cache


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x, cache):
        return self.attention(x, cache)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_cache_keeps_what_the_layer_writes_and_its_identity(mode, attached):
    model = Decoder()
    with mode(), attached(model, {"default": "fp16", "attention": "fp32"}) as attachment, attachment.context():
        cache = Cache()
        keys, first, static = cache.keys, cache.keys[0], cache.static
        for _ in range(2):
            out, handed_on = model(torch.ones(1, 2, dtype=HALF), cache)
    assert [each.dtype for each in model.attention.seen] == [torch.float32] * 2
    assert handed_on is cache and cache.keys is keys and cache.static is static and cache.count == 2
    assert first is keys[0] and len(keys) == 3 and out.dtype == torch.float32
    written = model.attention.key(torch.ones(1, 2))[0]
    torch.testing.assert_close(static.float(), torch.stack([written, written]), rtol=2**-10, atol=0)


class Features(nn.Module):
    """Takes one thing out of its input and puts another in."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, batch):
        read, write, drop = ACCESS[type(batch)]
        h = self.linear(read(batch))
        self.computed = h.dtype
        drop(batch)
        write(batch, h)
        return batch


class Slots:
    __slots__ = ("x", "gone", "h")

    def __init__(self, x, gone):
        self.x, self.gone = x, gone


ACCESS = {
    dict: (lambda b: b["x"], lambda b, h: b.update(h=h), lambda b: b.pop("gone")),
    OrderedDict: (lambda b: b["x"], lambda b, h: b.update(h=h), lambda b: b.pop("gone")),
    UserDict: (lambda b: b["x"], lambda b, h: b.update(h=h), lambda b: b.pop("gone")),
    list: (lambda b: b[0], lambda b, h: b.append(h), lambda b: b.pop()),
    deque: (lambda b: b[0], lambda b, h: b.append(h), lambda b: b.pop()),
    SimpleNamespace: (lambda b: b.x, lambda b, h: setattr(b, "h", h), lambda b: delattr(b, "gone")),
    Slots: (lambda b: b.x, lambda b, h: setattr(b, "h", h), lambda b: delattr(b, "gone")),
}
MAKE = {
    "dict": lambda x: {"x": x, "gone": 1},
    "OrderedDict": lambda x: OrderedDict(x=x, gone=1),
    "UserDict": lambda x: UserDict(x=x, gone=1),
    "list": lambda x: [x, 1],
    "deque": lambda x: deque([x, 1]),
    "attributes": lambda x: SimpleNamespace(x=x, gone=1),
    "slots": lambda x: Slots(x, 1),
}


def contents(batch):
    if isinstance(batch, (list, deque)):
        return dict(enumerate(batch))
    if isinstance(batch, Slots):
        return {name: getattr(batch, name) for name in Slots.__slots__ if hasattr(batch, name)}
    return dict(batch if isinstance(batch, (dict, UserDict)) else vars(batch))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    ("default", "inner", "came", "written"),
    [
        ("fp16", "fp32", torch.float16, torch.float32),
        ("fp32", "bf16", torch.float32, torch.float32),
        ("bf16", "fp32", torch.float32, torch.float32),
    ],
)
def test_a_layer_that_edits_its_input_edits_the_callers(default, inner, came, written, kind, attached):
    model = nn.Sequential(Features())
    x = torch.ones(1, 2, dtype=came)
    batch = MAKE[kind](x)
    with attached(model, {"default": default, "0": inner}) as attachment, attachment.context():
        result = model(batch)
    assert result is batch
    (first, kept), (_, h) = contents(batch).items()
    assert first in (0, "x") and kept is x and h.dtype == written and h.requires_grad


def test_what_the_layer_leaves_alone_is_left_alone(attached):
    class Reads(nn.Module):
        def forward(self, batch):
            self.seen = batch
            return batch["x"] + batch["inner"].y

    model = nn.Sequential(Reads())
    x, y = torch.ones(2, dtype=HALF), torch.ones(2, dtype=HALF)
    inner = SimpleNamespace(y=y, name="inner")
    batch = {"x": x, "inner": inner}
    with attached(model, {"default": "fp16", "0": "fp32"}) as attachment, attachment.context():
        assert model(batch).dtype == torch.float32
    seen = model[0].seen
    assert seen is not batch and seen["x"].dtype == seen["inner"].y.dtype == torch.float32
    assert batch == {"x": x, "inner": inner} and batch["x"] is x and vars(inner) == {"y": y, "name": "inner"}
    assert (x._version, y._version) == (0, 0)
