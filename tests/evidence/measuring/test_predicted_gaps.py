"""Predicted loss gaps of mixed formats beside measured ones: the cases of examples/benchmarks/planning.py."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "benchmarks"
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def planning():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        import planning

        yield planning
    finally:
        sys.path[:] = before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cnn", "gpt", "recurrent", "recommender"])
def test_predicted_gaps_rank_as_measured_ones(planning, name):
    line = planning.check(name, trained_for=100, assignments=50, batches=6, seed=0)
    assert line["correlation"] > planning.LEAST_CORRELATION
    assert planning.RATIOS[0] < line["ratio"]["median"] < planning.RATIOS[1]


def test_what_is_told_of_points(planning):
    points = [{"predicted": 2.0 * size, "measured": size, "turned": -size} for size in (0.0, 1.0, 2.0, 3.0)]
    told = planning.told(points)
    assert told["correlation"] == pytest.approx(1)
    assert told["correlation_of_gradients"] == pytest.approx(-1)
    assert told["ratio"] == {"low": 2, "median": 2, "high": 2}
