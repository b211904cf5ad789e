"""Two processes under one schedule: they change together, whatever each of them sees."""

from pathlib import Path

import pytest
from processes import saved_by_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return saved_by_two(Path(__file__).with_name("ddp_scheduler.py"), tmp_path_factory.mktemp("ddp"))


# Which phases come before which steps; two steps are an epoch.
EXPECTED = {"timed": [(1, 1), (2, 5)], "plateau": [(1, 6)], "first": [(1, 6)], "rate": [(1, 4)]}


@pytest.mark.parametrize(("name", "came"), EXPECTED.items(), ids=EXPECTED)
def test_both_ranks_do_what_the_first_says(ranks, name, came):
    first, second = (rank[name] for rank in ranks)
    assert first == second
    assert [(each["phase"], each["step"]) for each in first["came"]] == came
    assert len(first["history"]) == len(came)
