"""A checkpoint of two processes goes on in one, and one of one in two: the same numbers, decisions and records."""

from pathlib import Path

import pytest
from interruption.runs import BATCHES, differences, ending, trained
from processes import saved_by_two

pytestmark = pytest.mark.slow

SAME = ("losses", "step", "scale", "history", "skipped", "formats", "schedules", "optimizers", "plugin")
"""What does not depend on how many processes there are; names and events of ranks do."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, what one process ended with, and what each of two did."""
    folder = tmp_path_factory.mktemp("world")
    one = ending(*trained(folder / "one"))
    return folder, one, saved_by_two(Path(__file__).with_name("ddp_resume.py"), folder)


def assert_same(end, whole):
    begun = len(whole["losses"]) - len(end["losses"])
    end = {**end, "losses": whole["losses"][:begun] + end["losses"]}
    assert [each for name in SAME for each in differences(end[name], whole[name], name)] == []
    decided, expected = (each["monitors"]["AdaptivePrecision"]["decisions"] for each in (end, whole))
    assert [(made["step"], made["moves"]) for made in decided] == [(made["step"], made["moves"]) for made in expected]
    assert end["monitors"]["PrecisionScheduler"]["came"] == whole["monitors"]["PrecisionScheduler"]["came"]
    return begun


def test_two_processes_with_the_same_batches_are_one(runs):
    """Else what follows would compare nothing."""
    for rank in runs[2]:
        assert_same(rank["whole"], runs[1])


def test_a_checkpoint_of_one_process_goes_on_in_two(runs):
    for rank in runs[2]:
        assert assert_same(rank["resumed"], runs[1]) == 2 * BATCHES


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_two_processes_goes_on_in_one(runs, tmp_path):
    folder, one, _ = runs
    assert assert_same(ending(*trained(tmp_path, folder / "two/saved/epoch=1.ckpt")), one) == 2 * BATCHES
