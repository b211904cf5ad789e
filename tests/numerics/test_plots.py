"""What is drawn, read back from the axes."""

import math
import sys

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.metrics import SQNR, ExponentHistogram, OverflowRate, UnderflowRate
from lightning_mixprec.numerics.plots import draw_layers

# log2 of smallest subnormal, smallest normal and largest number.
RANGES = {
    "bf16": (-133, -126, math.log2(torch.finfo(torch.bfloat16).max)),
    "fp16": (-24, -14, math.log2(65504)),
    "e5m2": (-16, -14, math.log2(57344)),
    "e4m3": (-9, -6, math.log2(448)),
}


@pytest.fixture(autouse=True)
def _no_window():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def histogram(*values):
    metric = ExponentHistogram()
    metric.update(torch.tensor(values))
    return metric


def bars(ax):
    return {bar.get_x(): bar.get_height() for bar in ax.patches}


def named(ax):
    return {text.get_text(): text for text in ax.texts}


def lanes(ax):
    """Start, end and width of the horizontal lines, by the color of a format's name."""
    found = {}
    for line in ax.lines:
        (*xs,), ys = line.get_xdata(), line.get_ydata()
        if len(xs) == 2 and ys[0] == ys[1]:
            found.setdefault(to_rgb(line.get_color()), []).append((*xs, line.get_linewidth()))
    return {name: found[to_rgb(text.get_color())] for name, text in named(ax).items()}


def test_each_exponent_has_its_bar():
    figure, ax = histogram(1.0, -1.5, 2.0, 2.0**-20, 0.0).plot()
    assert bars(ax) == {0: 2, 1: 1, -20: 1}
    assert {bar.get_width() for bar in ax.patches} == {1}
    assert ax.get_yscale() == "log"
    figure.canvas.draw()


def test_each_format_has_its_range():
    _, ax = histogram(2.0**-140, 2.0**127).plot()
    low, high = ax.get_xlim()
    assert low <= -142
    assert high >= 129
    for name, (subnormal, normal, largest) in RANGES.items():
        thin, thick = sorted(lanes(ax)[name], key=lambda lane: lane[2])
        assert thin[:2] == (subnormal, normal)
        assert thick[:2] == (normal, largest)
        assert thin[2] < thick[2]
        ends = {line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"}
        assert {subnormal, normal, largest} <= ends


def test_a_range_that_goes_on_has_an_arrow():
    _, ax = histogram(1.0).plot()
    arrows = {(to_rgb(line.get_color()), line.get_marker()) for line in ax.lines if line.get_marker() in "<>"}
    bf16 = to_rgb(named(ax)["bf16"].get_color())
    assert arrows == {(bf16, "<"), (bf16, ">")}
    low, high = ax.get_xlim()
    assert low <= -24
    assert high >= 16
    assert low > -133


def test_no_bar_reaches_the_ranges():
    for count in (1, 10, 10**6):
        _, ax = histogram(*[1.0] * min(count, 1000), *[2.0] * 3).plot()
        lowest = min(text.get_position()[1] for text in ax.texts)
        for bar in ax.patches:
            top = ax.transAxes.inverted().transform(ax.transData.transform((0, bar.get_height())))[1]
            assert 0 < top < lowest - 0.02


def test_what_has_no_exponent_is_in_the_title():
    _, ax = histogram(*[1.0] * 1500, 0.0, 0.0, math.inf, math.nan, math.nan, math.nan).plot()
    assert ax.get_title() == "1,506 elements, of which 2 zero, 1 infinite, 3 NaN"


def test_nothing_can_be_drawn():
    figure, ax = histogram().plot()
    assert not bars(ax)
    assert len(lanes(ax)) == 4
    figure.canvas.draw()


def test_colors_are_safe_for_colour_blind_readers():
    _, ax = histogram(1.0).plot()
    colors = {to_rgb(text.get_color()) for text in ax.texts}
    # Okabe and Ito's blue, vermilion, bluish green and reddish purple.
    assert colors == {to_rgb(color) for color in ("#0072B2", "#D55E00", "#009E73", "#CC79A7")}


@pytest.mark.parametrize("metric", [histogram(1.0), UnderflowRate(), OverflowRate(), SQNR()], ids=type)
def test_plot_keeps_to_torchmetrics_convention(metric):
    data = [torch.tensor([1.0, 1e-30])] * (2 if isinstance(metric, SQNR) else 1)
    value = metric(*data)
    figure, ax = metric.plot()
    assert (figure, ax) == (plt.gcf(), plt.gca())
    other = plt.figure().add_subplot()
    assert metric.plot(value, ax=other)[1] is other
    assert metric.plot(val=value)[1] is not other


def test_scalars_draw_a_series_within_their_bounds():
    metric = UnderflowRate()
    values = [metric(torch.tensor([1.0, small])) for small in (1.0, 1e-30)]
    _, ax = metric.plot(values)
    assert ax.get_ylabel() == "UnderflowRate"
    assert ax.lines[0].get_ydata().tolist() == [0.0, 0.5]
    low, high = ax.get_ylim()
    assert low < 0 < 1 < high


def test_layers_have_bars_in_their_order():
    _, ax = draw_layers({"net.0": 0.5, "": 0.25}, "share", limit=0.4)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["net.0", '""']
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.25]
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "share"
    assert list(ax.lines[0].get_xdata()) == [0.4, 0.4]


def test_of_many_layers_the_first_are_drawn():
    _, ax = draw_layers({f"net.{index}": index for index in range(100)}, "index")
    assert [bar.get_width() for bar in ax.patches] == list(range(40))
    assert ax.get_title() == "40 of 100 layers"
    assert not ax.lines
    draw_layers({}, "nothing")[0].canvas.draw()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    metric = histogram(1.0)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (metric.plot, lambda: draw_layers({}, "nothing")):
        with pytest.raises(SupportError, match=r'^[^\n]*pip install "lightning_mixprec\[plot\]"$'):
            draw()
