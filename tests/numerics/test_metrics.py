"""The metrics against NumPy, real casts and exact rational arithmetic; and all that torchmetrics asks of a metric."""

import copy
import functools
import math
import pickle
from fractions import Fraction
from pathlib import Path

import lightning.pytorch as pl
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from processes import outcomes, started
from selection import slow_but_for
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics import exponents as stats
from lightning_mixprec.numerics import metrics, rates
from lightning_mixprec.numerics.metrics import SQNR, ExponentHistogram, OverflowRate, UnderflowRate
from lightning_mixprec.numerics.similarity import sqnr_db

REAL = {
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "fp8": ml_dtypes.float8_e4m3fn,
}
RATES = [UnderflowRate, OverflowRate]
ALL = [*RATES, SQNR, ExponentHistogram]

fp32_arrays = hnp.arrays(np.float32, st.integers(0, 30), elements=st.floats(width=32, allow_subnormal=True))
fp64_arrays = hnp.arrays(np.float64, st.integers(0, 30), elements=st.floats(allow_subnormal=True))
finite_arrays = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-1000, 1000, width=32))
scales = st.floats(1e-30, 1e30)


def updated(metric, *data):
    """The metric after updates with the data, of which SQNR takes pairs."""
    for each in data:
        metric.update(*each) if isinstance(metric, SQNR) else metric.update(each)
    return metric


def sample(metric, seed=0, count=200):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(count, generator=generator) * torch.logspace(-12, 8, count)
    data[:3] = torch.tensor([0.0, math.inf, -2.0])
    return (data[2:], data[2:].half().float().nan_to_num(posinf=0, neginf=0)) if isinstance(metric, SQNR) else data


def states(metric):
    return {name: state.clone() for name, state in metric.metric_state.items()}


def same(first, second):
    """Bit for bit, NaN like NaN."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


def bits(tensor):
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}
    return tensor.view(integers[tensor.dtype]) if tensor.dtype in integers else tensor


def share(part, whole):
    return torch.tensor(part / whole if whole else 0.0, dtype=torch.float32)


def expected_shares(products, name):
    """Shares that underflow and overflow in a real cast of fp32 numbers."""
    with np.errstate(all="ignore"):
        cast = products.astype(REAL[name]).astype(np.float32)
    counted = np.isfinite(products) & (products != 0)
    return share((counted & (cast == 0)).sum(), counted.sum()), share((~np.isfinite(cast)).sum(), cast.size)


@functools.cache
def ends(name):
    """From the table of all of a format's numbers the first two, the last two, and whether the last is even."""
    kind = np.dtype(REAL[name])
    codes = np.arange(2 ** (8 * kind.itemsize - 1), dtype=f"u{kind.itemsize}").view(kind)
    with np.errstate(invalid="ignore"):
        codes = codes.astype(np.float64)
    finite = codes[np.isfinite(codes)]
    return [Fraction(number) for number in finite[[0, 1, -2, -1]].tolist()], (len(finite) - 1) % 2 == 0


def rounds_exactly(product, name):
    """Whether a rational number underflows, and whether it overflows."""
    (zero, first, before_last, last), last_is_even = ends(name)
    after_last = 2 * last - before_last
    to_last, to_after_last = product - last, after_last - product
    overflows = to_last > to_after_last or (to_last == to_after_last and not last_is_even)
    return product - zero <= first - product, overflows


@pytest.mark.parametrize("name", slow_but_for({"fp16", "e4m3"}, REAL))
@given(data=fp32_arrays)
def test_rates_are_those_of_a_real_cast(name, data):
    underflow, overflow = expected_shares(data, name)
    for dtype in (torch.float32, torch.float64):
        tensor = torch.from_numpy(data).to(dtype)
        assert torch.equal(updated(UnderflowRate(name), tensor).compute(), underflow)
        assert torch.equal(updated(OverflowRate(name), tensor).compute(), overflow)


@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3", "e5m2"])
@given(exponents=st.lists(st.floats(-60, 60), min_size=1, max_size=20), shift=st.integers(-40, 40))
def test_rates_with_a_power_of_two_as_scale_are_those_of_a_real_cast(name, exponents, shift):
    data = np.exp2(np.array(exponents)).astype(np.float32)
    underflow, overflow = expected_shares((data.astype(np.float64) * 2.0**shift).astype(np.float32), name)
    assert torch.equal(updated(UnderflowRate(name, 2.0**shift), torch.from_numpy(data)).compute(), underflow)
    assert torch.equal(updated(OverflowRate(name, 2.0**shift), torch.from_numpy(data)).compute(), overflow)


@pytest.mark.parametrize("name", slow_but_for({"fp16", "e5m2"}, ["bf16", "fp16", "e4m3", "e5m2"]))
@pytest.mark.parametrize("dtype", slow_but_for({np.float32}, [np.float32, np.float64]))
@given(scale=scales)
def test_rates_are_exact_next_to_a_limit_for_any_scale(name, dtype, scale):
    kind = ml_dtypes.finfo(REAL[name])
    ulp = float(kind.max) - float(np.nextafter(kind.max, REAL[name](0)))
    for near in (float(kind.smallest_subnormal) / 2, float(kind.max) + ulp / 2):
        with np.errstate(all="ignore"):
            middle = dtype(near / scale)
            around = np.array([middle, np.nextafter(middle, dtype(0)), np.nextafter(middle, dtype(np.inf))])
        for number in around[np.isfinite(around) & (around > 0)]:
            underflows, overflows = rounds_exactly(Fraction(float(number)) * Fraction(scale), name)
            tensor = torch.tensor([number], dtype=torch.float32 if dtype is np.float32 else torch.float64)
            assert updated(UnderflowRate(name, scale), tensor).compute() == underflows
            assert updated(OverflowRate(name, scale), tensor).compute() == overflows


@given(data=fp64_arrays)
def test_fp64_loses_only_to_a_scale(data):
    tensor = torch.from_numpy(data)
    assert updated(UnderflowRate("fp64"), tensor).compute() == 0
    assert torch.equal(updated(OverflowRate("fp64"), tensor).compute(), share((~np.isfinite(data)).sum(), data.size))
    with np.errstate(all="ignore"):
        overflow = share((~np.isfinite(data * 2.0**30)).sum(), data.size)
        counted = np.isfinite(data) & (data != 0)
        underflow = share((counted & (data * 2.0**-30 == 0)).sum(), counted.sum())
    assert torch.equal(updated(OverflowRate("fp64", 2.0**30), tensor).compute(), overflow)
    assert torch.equal(updated(UnderflowRate("fp64", 2.0**-30), tensor).compute(), underflow)


@given(data=fp32_arrays, scale=scales)
def test_rates_lie_within_those_of_a_histogram(data, scale):
    tensor = torch.from_numpy(data)
    h = stats.histogram(tensor)
    for metric, told in [(UnderflowRate, rates.underflow_rate), (OverflowRate, rates.overflow_rate)]:
        low, high = told(h, "fp16", scale)
        assert low - 1e-6 <= updated(metric("fp16", scale), tensor).compute() <= high + 1e-6


def test_limits_everybody_quotes():
    around = torch.tensor([0.0, 2.0**-25, 2.0**-25 * (1 + 2.0**-20), 65519.996, 65520.0])
    assert UnderflowRate()(around) == 0.25
    assert torch.equal(OverflowRate()(around), torch.tensor(0.2))
    # The largest number of e4m3 is even and so takes the tie, unlike that of any other format.
    assert OverflowRate("e4m3")(torch.tensor([464.0, -464.5])) == 0.5
    assert OverflowRate("fp8")(torch.tensor([464.0, -464.5])) == 0.5
    assert OverflowRate("e5m2")(torch.tensor([61439.0, -61440.0])) == 0.5


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.complex64],
    ids=str,
)
def test_any_dtype_counts_as_its_numbers(dtype):
    data = torch.randn(64, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    numbers = torch.view_as_real(data).flatten() if dtype.is_complex else data
    for metric in (UnderflowRate("e4m3", 0.01), OverflowRate("e4m3", 300.0), ExponentHistogram()):
        fresh = copy.deepcopy(metric)
        assert_same_but_for_sums(updated(metric, data).compute(), updated(fresh, numbers.float()).compute())
    approximation = numbers.float().to(torch.float8_e5m2).float()
    pair = (data, torch.view_as_complex(approximation.view(-1, 2)) if dtype.is_complex else approximation)
    assert same(updated(SQNR(), pair).compute(), updated(SQNR(), (numbers.float(), approximation)).compute())


@pytest.mark.parametrize("kind", RATES)
def test_a_rate_of_nothing_is_zero(kind):
    metric = kind()
    metric.update(torch.zeros(0))
    metric.update([])
    assert metric.compute() == 0
    metric.update(torch.zeros(3))
    assert metric.compute() == 0


@given(data=fp64_arrays)
def test_the_histogram_is_numpys(data):
    result = updated(ExponentHistogram(), torch.from_numpy(data)).compute()
    finite = np.abs(data[np.isfinite(data) & (data != 0)])
    exponents = np.clip(np.frexp(finite)[1] - 1, stats.LOWEST, stats.HIGHEST)
    expected = {exponent: (exponents == exponent).sum() for exponent in set(exponents.tolist())}
    counted = zip(result["exponent"].tolist(), result["count"].tolist(), strict=True)
    assert {exponent: count for exponent, count in counted if count} == expected
    assert result["zero"] == (data == 0).sum()
    assert result["inf"] == np.isinf(data).sum()
    assert result["nan"] == np.isnan(data).sum()
    assert result["elements"] == data.size
    assert result["amax"] == finite.max(initial=0)
    log2 = np.log2(finite)
    mean, var = (log2.mean(), log2.var()) if finite.size else (math.nan, math.nan)
    assert result["log2_mean"].item() == pytest.approx(mean, rel=1e-6, abs=1e-6, nan_ok=True)
    assert result["log2_var"].item() == pytest.approx(var, rel=1e-5, abs=1e-5 * (1 + abs(mean) ** 2), nan_ok=True)


def test_the_histograms_result_has_a_fixed_shape():
    empty, full = ExponentHistogram(), updated(ExponentHistogram(), torch.randn(10))
    empty.update([])
    shapes = [{name: (t.shape, t.dtype) for name, t in metric.compute().items()} for metric in (empty, full)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == ["exponent", "count", "zero", "inf", "nan", "elements", "amax", "log2_mean", "log2_var"]
    assert shapes[0]["exponent"] == shapes[0]["count"] == (torch.Size([384]), torch.int64)


def test_the_histogram_is_there_for_the_rates():
    metric = updated(ExponentHistogram(), torch.tensor([1.0, 2.0**-30]), torch.tensor([2.0**-20, 0.0]))
    assert rates.underflow_rate(metric.histogram, "fp16") == (1 / 3, 1 / 3)


@given(reference=finite_arrays, noise=st.floats(0.001, 1.0), cut=st.integers(0, 30))
def test_sqnr_is_numpys(reference, noise, cut):
    approximation = (reference * np.float32(1 + noise)).astype(np.float32)
    signal = (reference.astype(np.float64) ** 2).sum()
    error = ((reference.astype(np.float64) - approximation) ** 2).sum()
    if signal > 0 and error > 0:
        pair = torch.from_numpy(reference), torch.from_numpy(approximation)
        metric = updated(SQNR(), tuple(each[:cut] for each in pair), tuple(each[cut:] for each in pair))
        assert metric.compute().item() == pytest.approx(10 * math.log10(signal / error), rel=1e-5, abs=1e-5)


SPECIAL = [
    ([1.0, -2.0], [1.0, -2.0], math.inf),
    ([0.0], [0.0], math.inf),
    ([0.0], [1.0], -math.inf),
    ([1.0], [math.inf], -math.inf),
    ([1.0], [math.nan], -math.inf),
    ([math.inf], [math.inf], math.nan),
    ([math.nan], [1.0], math.nan),
    ([], [], math.nan),
    ([1e200], [1e200], math.nan),  # whose square overflows
]


@pytest.mark.parametrize(("reference", "approximation", "expected"), SPECIAL)
def test_sqnr_where_it_is_no_number(reference, approximation, expected):
    pair = torch.tensor(reference, dtype=torch.float64), torch.tensor(approximation, dtype=torch.float64)
    assert updated(SQNR(), pair).compute().item() == pytest.approx(expected, nan_ok=True)
    assert sqnr_db(*pair).item() == pytest.approx(expected, nan_ok=True)


def test_sqnr_compares_elements_not_their_order_in_memory():
    reference = torch.randn(3, 4, 5, 6)
    assert updated(SQNR(), (reference, reference.to(memory_format=torch.channels_last))).compute() == math.inf
    assert updated(SQNR(), (reference.mT, reference.mT.contiguous())).compute() == math.inf


def test_sqnr_adds_in_fp64():
    metric = SQNR()
    metric.update(torch.tensor([1e4]), torch.tensor([1e4 - 1.0]))
    for _ in range(1000):
        metric.update(torch.tensor([1.0]), torch.tensor([1.0 + 2.0**-13]))
    expected = 10 * math.log10((1e8 + 1000) / (1 + 1000 * 2.0**-26))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-7)
    assert metric.signal == 1e8 + 1000


@pytest.mark.parametrize("kind", ALL)
def test_several_tensors_are_as_good_as_one(kind, monkeypatch):
    data = sample(kind())
    cut = [(each[:50], each[50:50], each[50:]) for each in (data if kind is SQNR else [data])]
    pieces = list(zip(*cut, strict=True)) if kind is SQNR else cut[0]
    whole = updated(kind(), data).compute()
    lists = updated(kind(), cut if kind is SQNR else iter(cut[0])).compute()
    parts = updated(kind(), *pieces).compute()
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    chunks = updated(kind(), data).compute()
    for other in (lists, parts, chunks):
        assert_same_but_for_sums(other, whole)


def assert_same_but_for_sums(actual, expected):
    if isinstance(expected, dict):
        for name in expected:
            rtol = 1e-6 if name.startswith("log2") else 0
            torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ALL)
def test_forward_gives_the_batchs_value_and_adds_it(kind):
    metric, first, second = kind(), sample(kind(), 0), sample(kind(), 1) if kind is SQNR else sample(kind(), 1)[:9]
    if kind is SQNR:
        second = tuple(each[:9] for each in second)
    one, two = (metric(*data) if kind is SQNR else metric(data) for data in (first, second))
    assert same(one, updated(kind(), first).compute())
    assert same(two, updated(kind(), second).compute())
    assert_same_but_for_sums(metric.compute(), updated(kind(), first, second).compute())
    assert not same(metric.compute(), two)


@pytest.mark.parametrize("kind", ALL)
def test_reset(kind):
    metric = updated(kind(), sample(kind()))
    assert not same(states(metric), states(kind()))
    metric.reset()
    assert same(states(metric), states(kind()))


@pytest.mark.parametrize("kind", ALL)
def test_no_state_keeps_a_graph(kind):
    metric = kind()
    weight = torch.ones(4, requires_grad=True)
    data = weight * 3
    metric(data, weight) if kind is SQNR else metric(data)
    assert not any(state.requires_grad for state in metric.metric_state.values())
    assert data.requires_grad


@pytest.mark.parametrize("kind", ALL)
def test_states_travel(kind):
    metric = updated(kind(), sample(kind()))
    assert same(states(pickle.loads(pickle.dumps(metric))), states(metric))
    assert same(states(metric.clone()), states(metric))
    assert not metric.state_dict()
    metric.persistent(True)
    fresh = kind()
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    assert same(states(fresh), states(metric))
    fresh.update(*sample(kind(), 1)) if kind is SQNR else fresh.update(sample(kind(), 1))
    assert_same_but_for_sums(fresh.compute(), updated(kind(), sample(kind()), sample(kind(), 1)).compute())


CASTS = {
    "half": lambda metric: metric.half(),
    "double": lambda metric: metric.double(),
    "set_dtype": lambda metric: metric.set_dtype(torch.float16),
    "to bf16": lambda metric: metric.to(torch.bfloat16),
    "to cpu in fp16": lambda metric: metric.to("cpu", torch.float16),
    "model half": lambda metric: nn.ModuleList([metric]).half()[0],
    "model to bf16": lambda metric: nn.ModuleList([metric]).to(torch.bfloat16)[0],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", ALL)
def test_states_keep_their_dtype_in_casts(kind, cast):
    metric = updated(kind(), sample(kind()))
    before, value = states(metric), metric.compute()
    metric = CASTS[cast](metric)
    assert same(states(metric), before)
    assert same(metric.compute(), value)
    metric.reset()
    assert same(states(metric), states(kind()))
    assert same(updated(metric, sample(kind())).compute(), value)


@pytest.mark.parametrize("kind", ALL)
def test_states_move_to_a_device(kind):
    metric = kind().to("meta")
    assert {state.device.type for state in metric.metric_state.values()} == {"meta"}
    assert metric.device.type == "meta"
    assert [state.dtype for state in metric.metric_state.values()] == [s.dtype for s in kind().metric_state.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ALL)
def test_data_and_states_on_any_device(kind):
    data = sample(kind())
    there = tuple(each.cuda() for each in data) if kind is SQNR else data.cuda()
    expected = updated(kind(), data).compute()
    for metric in (kind(), kind().cuda()):
        value = updated(metric, there, data, there[:0] if kind is not SQNR else there).compute()
        device = metric.device.type
        assert all(t.device.type == device for t in (value.values() if isinstance(value, dict) else [value]))
    value = updated(kind().cuda(), there).compute()
    value = {name: t.cpu() for name, t in value.items()} if isinstance(value, dict) else value.cpu()
    assert_same_but_for_sums(value, expected)


@pytest.mark.parametrize("forward", [False, True])
def test_metrics_of_a_collection_do_not_share_what_differs(forward):
    kinds = {
        "under fp16": lambda: UnderflowRate(),
        "under fp16 scaled": lambda: UnderflowRate(scale=1.5),
        "under bf16": lambda: UnderflowRate("bf16"),
        "over fp16": lambda: OverflowRate(),
        "over bf16": lambda: OverflowRate("bf16"),
        "histogram": lambda: ExponentHistogram(),
    }
    collection = MetricCollection({name: kind() for name, kind in kinds.items()})
    # After the first batch all rates are zero, and torchmetrics looks which states it may share.
    batches = [torch.ones(4), torch.tensor([1.0, 1e-30, 0.7 * 2.0**-25, 1e10, 1e-50]), torch.tensor([1e-9])]
    for batch in batches:
        collection(batch) if forward else collection.update(batch)
    result = collection.compute()
    for name in list(kinds)[:-1]:
        assert same(result[name], updated(kinds[name](), *batches).compute()), name
    assert torch.equal(result["count"], updated(ExponentHistogram(), *batches).compute()["count"])


def test_counts_beyond_what_floats_hold():
    for kind, data, expected in [
        (UnderflowRate, [1e-30, 1.0, 1.0], [2**33, 3 * 2**33]),
        (OverflowRate, [1e30, 1.0, 1.0], [2**33, 3 * 2**33]),
    ]:
        metric = doubled(updated(kind(), torch.tensor(data)), 33)
        metric.update(torch.tensor([1e-30, 1e30]))
        (counts,) = metric.metric_state.values()
        assert counts.tolist() == [count + extra for count, extra in zip(expected, (1, 2), strict=True)]
        assert torch.equal(metric.compute(), share(2**33 + 1, 3 * 2**33 + 2))
    metric = doubled(updated(UnderflowRate(), torch.tensor([1e-30])), 24)
    metric.update(torch.tensor([1e-30, 1.0, 1.0]))
    assert torch.equal(metric.compute(), share(2**24 + 1, 2**24 + 3))
    metric = doubled(updated(ExponentHistogram(), torch.tensor([1.0, 1.5, 0.0])), 33)
    metric.update(torch.tensor([1.0, 0.0, math.inf]))
    result = metric.compute()
    assert result["count"].max() == 2**34 + 1
    assert (result["zero"], result["inf"], result["elements"]) == (2**33 + 1, 1, 3 * 2**33 + 3)
    assert doubled(updated(SQNR(), (torch.ones(3), torch.zeros(3))), 33).elements == 3 * 2**33


def doubled(metric, times):
    for _ in range(times):
        metric.merge_state(metric.clone())
    return metric


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "2", None, True, 10**400])
def test_a_scale_that_is_none(kind, scale):
    with pytest.raises(FormatError, match=r"^scale must be a positive finite number, not .*$"):
        kind(scale=scale)


@pytest.mark.parametrize("kind", RATES)
def test_a_format_that_is_none(kind):
    with pytest.raises(FormatError, match=r"^unknown format 'half', did you mean 'fp16'\? .*$"):
        kind("half")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("wrong", [torch.arange(3), torch.ones(2, dtype=torch.bool), 3.0, None, [None], [1.0]], ids=str)
def test_what_holds_no_floating_point_numbers_is_refused_and_changes_nothing(kind, wrong):
    metric = updated(kind(), sample(kind()))
    before = states(metric)
    several = [torch.ones(2), *(wrong if isinstance(wrong, list) else [wrong])]
    for data in (wrong, several):
        with pytest.raises(FormatError) as caught:
            metric.update(data, data) if kind is SQNR else metric.update(data)
        assert "\n" not in str(caught.value)
    assert same(states(metric), before)


def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(FormatError, match=r"^.*\(2,\).*\(2, 1\)$"):
        SQNR().update(torch.ones(2), torch.ones(2, 1))
    with pytest.raises(FormatError, match="^cannot compare 1 tensors with 2$"):
        SQNR().update(torch.ones(2), [torch.ones(2), torch.ones(2)])


def test_what_torchmetrics_is_told():
    for kind in ALL:
        metric = kind()
        assert isinstance(metric, Metric)
        assert (metric.is_differentiable, metric.full_state_update) == (False, False)
        assert metric.higher_is_better is {SQNR: True, ExponentHistogram: None}.get(kind, False)
        bounds = (0.0, 1.0) if kind in RATES else (None, None)
        assert (metric.plot_lower_bound, metric.plot_upper_bound) == bounds
        assert {state.dtype for state in metric.metric_state.values()} <= {torch.int64, torch.float64}
    assert not UnderflowRate(sync_on_compute=False).sync_on_compute


class Logging(pl.LightningModule):
    """Logs every metric that is a number: the same object over all steps of an epoch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.under, self.over, self.sqnr = UnderflowRate("e5m2"), OverflowRate("e5m2"), SQNR()

    def training_step(self, batch, batch_idx):
        self.under(batch)
        self.over(batch)
        self.sqnr(batch, batch.bfloat16())
        for name in ("under", "over", "sqnr"):
            self.log(name, getattr(self, name), on_step=True, on_epoch=True)
        return self.layer(batch.clamp(-1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_logging_from_a_lightning_module():
    batches = list(torch.randn(3, 4, 3) * torch.tensor([1e-6, 1.0, 1e5]))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logging(), DataLoader(batches, batch_size=None))
    for suffix, data in [("_epoch", torch.stack(batches).numpy()), ("_step", batches[-1].numpy())]:
        underflow, overflow = expected_shares(data, "e5m2")
        cast = data.astype(ml_dtypes.bfloat16).astype(np.float64)
        sqnr = 10 * np.log10((data.astype(np.float64) ** 2).sum() / ((data - cast) ** 2).sum())
        assert trainer.callback_metrics["under" + suffix] == underflow
        assert trainer.callback_metrics["over" + suffix] == overflow
        assert trainer.callback_metrics["sqnr" + suffix].item() == pytest.approx(sqnr, rel=1e-5)
        assert 0 < underflow < 1
        assert 0 < overflow < 1


SCRIPT = """
import sys, torch, torch.distributed as dist
from lightning_mixprec.numerics.metrics import *
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
mine, pair = data[rank::2][: 40 - rank], data[:0]
kinds = [UnderflowRate("fp16", 0.3), OverflowRate("fp16", 3.0), ExponentHistogram(), SQNR()]
for metric in kinds[:3]:
    metric.update(mine)
kinds[3].update(*(t[rank::2] for t in (data[3:], data[3:].half().float())))
# Only one process has seen anything, and the other not even an empty tensor.
lonely = UnderflowRate()
if rank == 1:
    lonely.update(mine)
else:
    lonely.update([])
result = [metric.compute() for metric in [*kinds, lonely]]
with kinds[2].sync_context():
    counts = kinds[2].histogram.counts
torch.save([result, counts, kinds[2].histogram.counts], f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path):
    data = sample(None, count=80).clamp(-6e4, 6e4)
    torch.save(data, tmp_path / "data.pt")
    root = str(Path(metrics.__file__).parents[2])
    outcomes([started(["-c", SCRIPT, rank, tmp_path], root) for rank in range(2)])
    seen = [data[0::2], data[1::2][:39]]
    kinds = [UnderflowRate("fp16", 0.3), OverflowRate("fp16", 3.0), ExponentHistogram()]
    expected = [updated(metric, torch.cat(seen)).compute() for metric in kinds]
    expected += [updated(SQNR(), (data[3:], data[3:].half().float())).compute()]
    expected += [updated(UnderflowRate(), seen[1]).compute()]
    for rank in range(2):
        results, counts, own_counts = torch.load(tmp_path / f"rank{rank}.pt")
        for actual, wanted in zip(results, expected, strict=True):
            assert_same_but_for_sums(actual, wanted)
        assert torch.equal(counts, stats.histogram(seen).counts)
        assert torch.equal(own_counts, stats.histogram(seen[rank]).counts)
    assert all(0 < rate < 1 for rate in (*expected[:2], expected[-1]))
