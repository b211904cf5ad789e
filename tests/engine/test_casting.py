import dataclasses
import warnings
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_mixprec.engine.casting import FLOATING, all_to, cast, cast_floating, first_floating, holds_dtype

TO_BF16 = {torch.float32: torch.bfloat16}
Point = namedtuple("Point", "x label")


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    label: torch.Tensor
    cache: Any = dataclasses.field(default=None, init=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    twice: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "twice", self.x * 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: torch.Tensor


@dataclasses.dataclass
class Output(OrderedDict):
    """As transformers' outputs: fields that are items, and items that are fields."""

    loss: torch.Tensor = None
    states: tuple = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Path(list):
    def __init__(self, items, owner):
        super().__init__(items)
        self.owner = owner


class Pair(tuple):
    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


class Counted(dict):
    def __init__(self, items, count):
        super().__init__(items)
        self.count = count


def one(dtype=torch.float32):
    return torch.ones(2, dtype=dtype)


def test_a_tensor_of_another_dtype_is_handed_back_itself():
    for value in (one(torch.int64), one(torch.bool), one(torch.complex64), one(torch.float64), torch.tensor(3)):
        assert cast(value, TO_BF16) is value


@pytest.mark.parametrize(
    "value", [None, 1, 1.5, "text", b"bytes", torch.Size([2]), range(3), object(), Batch, torch.nn.ReLU()]
)
def test_what_holds_no_tensor_is_handed_back_itself(value):
    assert cast(value, TO_BF16) is value


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, 1),
        lambda x: [x, None],
        lambda x: {"a": {"b": [x]}},
        lambda x: Point(x, "label"),
        lambda x: Batch(x, 1),
        lambda x: Frozen(x),
        lambda x: Slotted(x),
        lambda x: Output(x, (x,)),
        lambda x: Path([x], "me"),
        lambda x: Pair(x, 1),
        lambda x: Counted({"x": x}, 3),
        lambda x: UserDict(x=x),
        lambda x: defaultdict(list, x=[x]),
        lambda x: torch.max(x.reshape(1, 2), 1),
        lambda x: pack_sequence([x]),
    ],
)
def test_a_container_is_rebuilt_as_its_kind_and_only_if_something_in_it_changed(make):
    before = make(one())
    after = cast(before, TO_BF16)
    assert type(after) is type(before) and after is not before
    assert holds_dtype(after, torch.bfloat16) and not holds_dtype(after, torch.float32)
    assert holds_dtype(before, torch.float32) and not holds_dtype(before, torch.bfloat16)
    same = make(one(torch.float64))
    assert cast(same, TO_BF16) is same


def test_only_the_changed_branch_is_rebuilt():
    ints, floats = [one(torch.int32)], [one()]
    after = cast({"ints": ints, "floats": floats}, TO_BF16)
    assert after["ints"] is ints and after["floats"] is not floats
    assert list(after) == ["ints", "floats"]


def test_attributes_of_container_subclasses_stay():
    assert cast(Path([one()], "me"), TO_BF16).owner == "me"
    assert cast(Counted({"x": one()}, 3), TO_BF16).count == 3
    assert cast(defaultdict(list, x=one()), TO_BF16).default_factory is list


def test_an_output_that_is_dict_and_dataclass_changes_as_both():
    before = Output(one(), (one(), one()))
    after = cast(before, TO_BF16)
    assert after.loss is after["loss"] and after.loss.dtype == torch.bfloat16
    assert after.states is after["states"] and after.states[1].dtype == torch.bfloat16
    assert before.loss is before["loss"] and before.loss.dtype == torch.float32


def test_fields_outside_init_are_cast():
    assert cast(Frozen(one()), TO_BF16).twice.tolist() == [2, 2]
    batch = Batch(one(), one(torch.int64))
    batch.cache = [one()]
    after = cast(batch, TO_BF16)
    assert (
        after.cache[0].dtype == torch.bfloat16 and after.label is batch.label and batch.cache[0].dtype == torch.float32
    )


def test_packed_sequences_and_return_types_keep_their_indices():
    packed = cast(pack_sequence([one(), torch.ones(1)]), TO_BF16)
    assert packed.data.dtype == torch.bfloat16 and packed.batch_sizes.tolist() == [2, 1]
    values, indices = cast(torch.tensor([[1.0, 3.0]]).max(1), TO_BF16)
    assert values.dtype == torch.bfloat16 and indices.item() == 1


def test_the_cast_is_differentiable_and_keeps_the_layout():
    x = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = cast([x], TO_BF16)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_sparse_nested_and_views():
    assert cast(torch.eye(3).to_sparse(), TO_BF16).dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype, once per process
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert cast(nested, TO_BF16).dtype == torch.bfloat16
    base = torch.arange(6.0).reshape(2, 3)
    assert cast(base.t()[1:], TO_BF16).tolist() == base.t()[1:].tolist()


def test_tensor_subclasses_stay_what_they_are():
    class Tagged(torch.Tensor):
        pass

    assert type(cast((one().as_subclass(Tagged),), TO_BF16)[0]) is Tagged


@pytest.mark.parametrize("dtype", FLOATING)
def test_everything_floating_goes_into_fp32(dtype):
    assert cast_floating([one().to(dtype)], torch.float32)[0].dtype == torch.float32
    assert dtype not in all_to(dtype)


def test_first_floating_follows_the_order_of_what_is_passed():
    half = one(torch.float16)
    assert first_floating((1, one(torch.int64), {"a": [one(torch.complex64), half]}, one())) is half
    assert first_floating((1, "x", one(torch.bool))) is None
    assert first_floating(Batch(half, 1)) is half


def test_a_tensor_that_occurs_twice_stays_one_tensor():
    x = one()
    query, rest = cast((x, {"key": x, "value": [x]}), TO_BF16)
    assert query is rest["key"] is rest["value"][0]
