"""A fast part of the rescue suite (examples/benchmarks/rescue.py): one seed of a few cases of each kind."""

import sys
from functools import cache
from pathlib import Path

import pytest
from selection import slow_but_for

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
OVERFLOW, SILENT = ["ffn", "likelihood", "dice", "tasks"], ["rms-norm", "fourier", "offset", "words"]


@pytest.fixture(scope="module")
def suite():
    """The suite's modules, imported as its command does."""
    sys.path.insert(0, str(FOLDER))
    try:
        import rescue
        import rescue_cases.runs
    finally:
        sys.path.remove(str(FOLDER))
    return rescue, rescue_cases


@pytest.fixture(scope="module")
def runs_of(suite):
    """The three runs of a case, each made once."""

    @cache
    def run(name, how):
        return suite[1].runs.run_case(name, 0, how)

    return lambda name: {how: [run(name, how)] for how in ("fp32", "16-mixed", "ours")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", slow_but_for({"rms-norm"}, [*OVERFLOW, *SILENT]))
def test_a_lost_run_is_rescued(suite, runs_of, name):
    """The seconds of three runs of some hundred steps."""
    rescue, cases = suite
    verdict = rescue.judge(cases.CASES[name], runs_of(name), is_control=False)
    assert str(verdict) == "yes", verdict


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlp", "contrastive", "tiny-weight"])
def test_a_healthy_run_is_left_alone(suite, runs_of, name):
    rescue, cases = suite
    verdict = rescue.judge(cases.CONTROLS[name], runs_of(name), is_control=True)
    assert str(verdict) == "yes", verdict
    assert verdict.moves == [0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_rule_is_not_met_by_anything(suite, runs_of):
    rescue, cases = suite
    case, runs = cases.CASES["ffn"], runs_of("ffn")
    lost = rescue.judge(case, {**runs, "ours": runs["16-mixed"]}, is_control=False)
    assert not (lost.checks["b"] or lost.checks["c"] or lost.checks["d"] or lost.checks["f"])
    void = rescue.judge(case, {**runs, "16-mixed": runs["fp32"], "ours": runs["fp32"]}, is_control=False)
    assert str(void) == "void"
