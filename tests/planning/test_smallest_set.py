"""The search for a smallest set, against worlds in which the answer is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixprec.planning.smallest_set import smallest


@st.composite
def worlds(draw):
    count = draw(st.integers(1, 60))
    candidates = [str(number) for number in range(count)]
    needed = draw(st.sets(st.sampled_from(candidates), min_size=1, max_size=4))
    return candidates, needed


@given(worlds())
def test_it_finds_exactly_what_is_needed(world):
    candidates, needed = world
    asked = []

    def works(chosen):
        asked.append(frozenset(chosen))
        return needed <= set(chosen)

    assert smallest(candidates, works, max_tries=1000) == [name for name in candidates if name in needed]
    assert len(asked) == len(set(asked)), "the same set was tried twice"
    depth = math.ceil(math.log2(len(candidates))) + 1
    assert len(asked) <= depth + 2 * len(needed) * (depth + 1)


@given(worlds(), st.data())
def test_of_two_answers_the_likelier_one_is_found(world, data):
    candidates, _ = world
    early, late = sorted(data.draw(st.lists(st.sampled_from(candidates), min_size=2, max_size=2)), key=int)
    found = smallest(candidates, lambda chosen: early in chosen or late in chosen, max_tries=1000)
    assert found == [early]


@given(worlds(), st.integers(1, 12))
def test_out_of_tries_it_answers_with_the_smallest_set_seen_to_work(world, tries):
    candidates, needed = world
    worked = []

    def works(chosen):
        if needed <= set(chosen):
            worked.append(list(chosen))
        return needed <= set(chosen)

    found = smallest(candidates, works, max_tries=tries)
    if found is None:
        assert not worked
    else:
        assert needed <= set(found)
        assert len(found) == min(map(len, worked))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_nothing_works(count):
    assert smallest([str(number) for number in range(count)], lambda chosen: False, max_tries=50) is None


def test_the_first_candidate_alone_costs_one_try():
    asked = []
    assert smallest(["a", *"bcdefgh"], lambda chosen: asked.append(chosen) or "a" in chosen, max_tries=50) == ["a"]
    assert asked == [["a"]]
