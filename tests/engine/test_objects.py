"""Objects of any class that hold tensors, drawn at random, against a copy made by pickling and changed by hand."""

import copy
import pickle
import threading
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mixprec.engine.casting import cast
from lightning_mixprec.engine.objects import copied, mapped, named_tensors, rebuilt, tensors_in
from lightning_mixprec.errors import SupportError

HALF = torch.float16
WIDEN = {HALF: torch.float32}


class Own:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("__b", "a")

    def __init__(self, a, b):
        self.a, self.__b = a, b


class Stubborn:
    """Refuses to be set, copied and pickled, and computes whatever it is asked for."""

    def __init__(self, x):
        self.__dict__["x"] = x
        self.__dict__["lock"] = threading.Lock()

    def __setattr__(self, name, value):
        raise AttributeError("frozen")

    def __getattr__(self, name):
        raise RuntimeError("computed")

    def __copy__(self):
        raise TypeError("no copies")

    def __reduce_ex__(self, protocol):
        raise TypeError("no pickles")


class Fixed(dict):
    def __setitem__(self, key, value):
        raise TypeError("fixed")


class Attributes(dict):
    """A dict whose items are its attributes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Store(MutableMapping):
    """As a graph's: a mapping that knows its owner weakly and gives its items as attributes."""

    def __init__(self, owner):
        self.__dict__["_mapping"], self.__dict__["_owner"] = {}, weakref.ref(owner)

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, key):
        return self._mapping[key]

    def __setitem__(self, key, value):
        self._mapping[key] = value

    def __delitem__(self, key):
        del self._mapping[key]

    def __iter__(self):
        return iter(self._mapping)

    def __len__(self):
        return len(self._mapping)


class Graph:
    def __init__(self, **items):
        self._store = Store(self)
        self._store.update(items)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any


def tensors():
    dtypes = (HALF, torch.float32, torch.int64)
    return st.sampled_from(dtypes).map(lambda dtype: torch.arange(3).to(dtype))


def holders(inner):
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs,
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        pairs.map(lambda pair: Point(*pair)),
        pairs.map(lambda pair: Frozen(*pair)),
        pairs.map(lambda pair: Own(a=pair[0], b=pair)),
        pairs.map(lambda pair: Own(first=pair[0], again=pair[0], both=[pair, pair])),
        pairs.map(lambda pair: UserDict(a=pair[0], b=pair[1])),
        pairs.map(lambda pair: OrderedDict(a=pair[0], b=pair[1])),
        pairs.map(lambda pair: defaultdict(list, a=pair[0])),
        pairs.map(lambda pair: SimpleNamespace(a=pair[0], b=pair[1])),
        pairs.map(deque),
    )


LEAVES = st.one_of(tensors(), st.none(), st.just("text"), st.integers())
PUBLIC = st.recursive(LEAVES, holders, max_leaves=12)
VALUES = st.one_of(PUBLIC, st.tuples(PUBLIC, PUBLIC).map(lambda pair: Slotted(*pair)))


def parts(value):
    """The parts of the drawn classes, read as their authors would."""
    if isinstance(value, (tuple, list, deque)):
        return list(value)
    if isinstance(value, (dict, UserDict)):
        return list(value.values())
    if isinstance(value, Slotted):
        return [value._Slotted__b, value.a]
    return list(vars(value).values()) if isinstance(value, (Own, Frozen, SimpleNamespace)) else []


def walk_both(a, b, met):
    """Walks two values that are to be alike: every pair of tensors, and each object with one counterpart."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        yield a, b
        return
    if isinstance(a, (str, int, type(None))):
        assert a == b
        return
    if id(a) in met:
        assert isinstance(a, tuple) or met[id(a)] is b
        return
    met[id(a)] = b
    assert len(parts(a)) == len(parts(b))
    for one, other in zip(parts(a), parts(b), strict=True):
        yield from walk_both(one, other, met)


@settings(deadline=None)
@given(VALUES)
def test_a_cast_changes_the_dtypes_asked_for_and_nothing_else(value):
    before = pickle.dumps(value)
    after = cast(value, WIDEN)
    assert pickle.dumps(value) == before
    counterparts = {}
    for old, new in walk_both(value, after, {}):
        assert new.dtype == WIDEN.get(old.dtype, old.dtype) and torch.equal(old.to(new.dtype), new)
        assert (new is old) == (old.dtype != HALF) and counterparts.setdefault(id(old), new) is new
    if not any(tensor.dtype == HALF for tensor in tensors_in(value)):
        assert after is value
    assert {id(tensor) for tensor in tensors_in(after)} == {id(new) for _, new in walk_both(value, after, {})}


@settings(deadline=None)
@given(VALUES)
def test_copies_share_no_tensor_and_rebuilt_values_share_them_all(value):
    mine = {id(tensor) for tensor in tensors_in(value)}
    assert all(id(new) not in mine and torch.equal(old, new) for old, new in walk_both(value, copied(value), {}))
    assert all(old is new for old, new in walk_both(value, rebuilt(value), {}))


@settings(deadline=None)
@given(PUBLIC)
def test_tensors_are_found_where_they_are_said_to_be(value):
    for where, tensor in named_tensors(value):
        assert eval(f"value{where}", {"value": value}) is tensor


def test_cycles_shared_parts_and_weak_references_end_where_they_should():
    x = torch.ones(2, dtype=HALF)
    ring = Own(x=x)
    ring.whole, ring.inner = ring, [ring, Own(owner=ring)]
    after = cast(ring, WIDEN)
    assert after is not ring and after.whole is after is after.inner[0] is after.inner[1].owner
    graph = Graph(x=x, label=1)
    after = cast(graph, WIDEN)
    assert after._store.x.dtype == torch.float32 and after._store._owner() is after and graph._store.x is x
    chain = Own(x=x)
    for _ in range(3000):
        chain = Own(rest=chain)
    assert next(tensors_in(cast(chain, WIDEN))).dtype == torch.float32


def test_an_ordered_dict_keeps_its_order():
    value = OrderedDict(a=torch.ones(2, dtype=HALF), b=1)
    value.move_to_end("a")
    assert list(cast(value, WIDEN)) == list(copied(value)) == ["b", "a"]


def test_a_dict_of_attributes_stays_one():
    for make in (lambda value: cast(value, WIDEN), copied, rebuilt):
        value = Attributes(x=torch.ones(2, dtype=HALF))
        after = make(value)
        after.y = 1
        assert after is not value and after.x is after["x"] and after["y"] == 1 and "y" not in value


def test_no_code_of_the_class_runs():
    after = cast([Stubborn(torch.ones(2, dtype=HALF)), Fixed(x=torch.ones(2, dtype=HALF))], WIDEN)
    assert [tensor.dtype for tensor in tensors_in(after)] == [torch.float32] * 2
    assert type(after[0]) is Stubborn and type(after[1]) is Fixed
    assert copied(Stubborn(torch.ones(1))).x.item() == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda x: nn.Module(),
        lambda x: (part for part in [x]),
        lambda x: lambda: x,
        lambda x: torch.utils.data.TensorDataset(x),
        lambda x: torch.optim.SGD([x.float().requires_grad_()], 0.1),
        lambda x: threading.Thread(target=print, args=(x,)),
    ],
    ids=["module", "generator", "function", "data set", "optimizer", "thread"],
)
def test_what_is_no_record_is_handed_on_as_it_is(make):
    value = make(torch.ones(2, dtype=HALF))
    assert cast(value, WIDEN) is value and cast([value], WIDEN)[0] is value


def test_distributions_are_objects_like_any_other():
    normal = torch.distributions.Normal(torch.zeros(2, dtype=HALF), torch.ones(2, dtype=HALF))
    assert cast(normal, WIDEN).sample().dtype == torch.float32 and normal.loc.dtype == HALF


class Uncopied(deque):
    def __copy__(self):
        raise TypeError("not this one")


def test_what_cannot_be_copied_is_named_with_what_to_do():
    value = Uncopied([torch.ones(2, dtype=HALF)])
    assert cast(value, {}) is value
    with pytest.raises(SupportError, match=r"^a Uncopied holds floating tensors .*not this one.*__copy__.*tensors$"):
        cast(value, WIDEN)


def test_a_copy_of_what_deepcopy_refuses():
    x = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(RuntimeError):
        copy.deepcopy([x])
    after = copied({"x": x, "lock": Stubborn(x)})
    assert after["x"].is_leaf and after["x"] is after["lock"].x and after["x"].tolist() == [2, 2]


ITERATORS = {
    "list": lambda: iter([1, 2]),
    "zip": lambda: zip([1, 2], [3, 4], strict=True),
    "map": lambda: map(str, [1, 2]),
    "in a dict": lambda: {"parts": iter([1, 2])},
}


@pytest.mark.parametrize("name", ITERATORS)
def test_a_copy_of_an_iterator_leaves_the_iterator_where_it_is(name):
    value = ITERATORS[name]()
    walked = [list(each["parts"] if isinstance(each, dict) else each) for each in (copied(value), value)]
    assert len(walked[0]) == 2 and walked[0] == walked[1]


@pytest.mark.parametrize("hold", [lambda each: each, lambda each: {"parts": [each]}], ids=["bare", "held"])
def test_what_can_be_gone_through_only_once_is_not_copied(hold):
    value = hold(each for each in [1, 2])
    with pytest.raises(SupportError, match="a generator can be gone through only once.*a list instead"):
        copied(value)


def test_other_tensors_are_put_in_by_a_function():
    value = Own(rows=torch.arange(4), rest=(torch.zeros(1), "text"))
    after = mapped(value, lambda tensor: tensor[:2] if len(tensor) == 4 else tensor)
    assert after.rows.tolist() == [0, 1] and after.rest is value.rest
