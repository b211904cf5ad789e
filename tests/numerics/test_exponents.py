"""Histograms against a plain count of NumPy's frexp exponents."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics import exponents as stats
from lightning_mixprec.numerics import flat_batches as segments
from lightning_mixprec.numerics.exponents import BINS, HIGHEST, LOWEST, Histogram, histogram, histograms

FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
EXACT = ("counts", "zeros", "infs", "nans", "amax", "elements")


def numpy_histogram(values):
    """The same by definition, from fp64, which holds every number of the narrower formats."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        magnitudes = np.abs(np.asarray(values, dtype=np.float64).ravel())
    finite = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    mantissa, exponent = np.frexp(finite)
    half_bin = np.clip(2 * (exponent - 1 - LOWEST) + (mantissa != 0.5), 0, BINS - 1)
    log2 = np.log2(finite)
    return {
        "counts": np.bincount(half_bin, minlength=BINS),
        "zeros": np.count_nonzero(magnitudes == 0),
        "infs": np.count_nonzero(np.isinf(magnitudes)),
        "nans": np.count_nonzero(np.isnan(magnitudes)),
        "amax": finite.max(initial=0.0),
        "log2_sum": log2.sum(),
        "log2_square_sum": np.square(log2).sum(),
        "elements": magnitudes.size,
    }


def assert_is(histogram, expected):
    for name in EXACT:
        assert np.array_equal(getattr(histogram, name).numpy(), expected[name]), name
    for name in ("log2_sum", "log2_square_sum"):
        assert getattr(histogram, name).item() == pytest.approx(expected[name], rel=1e-6, abs=1e-5), name


def assert_same(one, other):
    for name in EXACT:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("log2_sum", "log2_square_sum"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-6)


def all_codes(dtype):
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return torch.arange(2 ** (8 * dtype.itemsize)).to(integers).view(dtype)


def random_bits(dtype, count=200_000, seed=0):
    """Every bit random, with many subnormals, zeros, infinities, NaNs and powers of two put in."""
    integers, bits, mantissa = {torch.float32: (np.int32, 32, 23), torch.float64: (np.int64, 64, 52)}[dtype]
    random = np.random.default_rng(seed)
    codes = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count, dtype=integers)
    codes[: count // 4] >>= random.integers(0, bits, count // 4, dtype=integers)
    codes[: count // 8] &= (1 << mantissa) - 1
    codes[-count // 8 :] &= -(1 << mantissa)
    return torch.from_numpy(codes).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOAT8], ids=str)
def test_every_code_of_the_small_formats(dtype):
    codes = all_codes(dtype)
    assert_is(histogram(codes), numpy_histogram(codes.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_random_bit_patterns(dtype):
    values = random_bits(dtype)
    expected = numpy_histogram(values)
    assert min(expected[name] for name in ("zeros", "infs", "nans")) > 0
    assert_is(histogram(values), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_at_the_ends_of_the_bins(dtype):
    info = torch.finfo(dtype)
    exponents = torch.arange(max(LOWEST - 3, math.log2(info.smallest_normal)), min(HIGHEST + 3, math.log2(info.max)))
    powers = torch.exp2(exponents.double()).to(dtype)
    neighbours = [torch.nextafter(powers, torch.full_like(powers, towards)) for towards in (0, math.inf)]
    values = torch.cat([powers, -powers, *neighbours])
    assert_is(histogram(values), numpy_histogram(values))


@given(values=st.lists(st.floats(width=32), max_size=40))
def test_any_numbers(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    assert_is(histogram(tensor), numpy_histogram(tensor))


@given(values=st.lists(st.floats(), max_size=40))
def test_any_numbers_in_fp64(values):
    assert_is(histogram(torch.tensor(values, dtype=torch.float64)), numpy_histogram(values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_flushing_subnormals_to_zero_changes_nothing(dtype):
    values = random_bits(torch.float32) if dtype == torch.float32 else all_codes(dtype)
    tiny = values[values.abs() < torch.finfo(dtype).smallest_normal]
    groups = [[values], [tiny], [tiny.repeat(1000)]]
    expected = histograms(groups)
    assert expected.amax[1] > 0
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot flush subnormals to zero")
        flushed = histograms(groups)
    finally:
        torch.set_flush_denormal(False)
    assert_same(flushed, expected)
    assert_is(flushed.select(1), numpy_histogram(tiny.double()))


def mixed_groups():
    torch.manual_seed(0)
    return [
        [torch.randn(64, 3, 7, 7), torch.randn(64)],
        [],
        [torch.empty(0, 5)],
        [torch.randn(300, 300) * 1e-30, torch.zeros(5).half(), torch.randn(11).double() * 1e-200],
        [torch.randn(64, 64).bfloat16()],
        [torch.tensor(2.0), torch.tensor(math.nan, dtype=torch.float64), torch.randn(9).to(torch.float8_e5m2)],
        [torch.full((70_000,), -math.inf), torch.randn(150_000)],
        [torch.randn(8, 8)] * 3,
    ]


def concatenated(group):
    return torch.cat([tensor.flatten().double() for tensor in group]) if group else torch.empty(0)


def test_groups_of_all_kinds_at_once():
    groups = mixed_groups()
    rows = histograms(groups)
    assert rows.counts.shape == (len(groups), BINS)
    for index, group in enumerate(groups):
        assert_is(rows.select(index), numpy_histogram(concatenated(group)))
        assert_same(histogram(group), rows.select(index))


def test_many_small_tensors_take_few_kernels():
    def kernels(groups):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            histograms(groups)
        arithmetic = {"aten::bincount", "aten::log2_", "aten::cat", "aten::sum", "aten::amax", "aten::__rshift__"}
        return sum(event.count for event in profile.key_averages() if event.key in arithmetic)

    few, many = ([[torch.ones(32, 32)] for _ in range(count)] for count in (2, 60))
    assert kernels(many) == kernels(few)


def test_no_groups():
    assert histograms([]).counts.shape == (0, BINS)
    assert_is(histogram([]), numpy_histogram([]))


def test_layouts_are_read_without_a_copy():
    base = torch.randn(4, 6, 5, 3)
    for view in (
        base.contiguous(memory_format=torch.channels_last),
        base.transpose(0, 2),
        base[:, :1],
        base[1:3],
        base.new_empty(0, 2),
    ):
        assert sorted(segments.flatten(view).tolist()) == sorted(view.flatten().tolist())
    dense = base.contiguous(memory_format=torch.channels_last).permute(3, 0, 2, 1)
    assert segments.flatten(dense).untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()


def test_views_with_gaps_and_repetitions():
    base = random_bits(torch.float32, 4096).view(64, 64)
    for view in (base[:, ::3], base[::2], base.T[3:], base[:1].expand(7, 64), base[0, 0]):
        assert_is(histogram(view), numpy_histogram(view))


def test_complex_tensors_count_as_their_parts():
    values = torch.randn(3, 5, dtype=torch.complex64)
    expected = numpy_histogram(torch.view_as_real(values))
    assert_is(histogram(values), expected)
    assert_is(histogram(values.conj()), expected)
    assert_is(histogram(values.conj().imag), numpy_histogram(values.imag))
    assert_is(histogram(values.to(torch.complex128)), expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_gradients_count_by_their_coalesced_values():
    embedding = torch.nn.Embedding(100, 4, sparse=True)
    embedding(torch.tensor([3, 3, 7])).sum().backward()
    counted = histogram(embedding.weight.grad)
    assert counted.by_exponent[[-LOWEST, 1 - LOWEST]].tolist() == [4, 4]
    assert (int(counted.elements), int(counted.zeros)) == (8, 0)
    assert int(histogram(torch.eye(3).to_sparse_csr()).elements) == 3


def test_of_a_distributed_tensor_the_local_part_counts():
    class Sharded(torch.Tensor):
        def to_local(self):
            return torch.tensor([4.0, 0.0])

    assert_is(histogram(torch.ones(7).as_subclass(Sharded)), numpy_histogram([4.0, 0.0]))


def test_parameters_are_counted_without_a_graph():
    layer = torch.nn.Linear(3, 3)
    counted = histogram(layer.weight)
    assert not any(getattr(counted, field.name).requires_grad for field in dataclasses.fields(counted))


def test_the_data_is_left_as_it_is():
    groups = mixed_groups()
    before = [[tensor.clone() for tensor in group] for group in groups]
    histograms(groups)
    for group, copies in zip(groups, before, strict=True):
        for tensor, copy in zip(group, copies, strict=True):
            assert torch.equal(tensor.double().nan_to_num(7), copy.double().nan_to_num(7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, dtype=torch.bool), "torch.bool"),
        (1.0, "float"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4"),
    ],
    ids=["int64", "bool", "float", "float4"],
)
def test_what_has_no_exponents_is_refused(wrong, message):
    with pytest.raises(FormatError, match=message) as caught:
        histogram([torch.ones(2), wrong])
    assert "\n" not in str(caught.value)


def test_counts_beyond_what_fp32_holds():
    count = 2**24 + 3
    counted = histogram(torch.ones(1, dtype=torch.float16).expand(count))
    assert int(counted.counts[-2 * LOWEST]) == int(counted.elements) == count


def test_exponents_and_totals():
    counted = histogram(torch.tensor([0.0, 1.0, 1.5, -2.0, 3.0, math.inf, -math.inf, math.nan]))
    assert {e + LOWEST: count for e, count in enumerate(counted.by_exponent.tolist()) if count} == {0: 2, 1: 2}
    assert (int(counted.finite_nonzero), int(counted.counted)) == (4, 8)


def test_mean_and_variance_of_the_logarithm():
    counted = histogram(torch.tensor([0.0, 2.0**-10, 2.0**-20, math.inf]))
    assert (counted.log2_mean.item(), counted.log2_var.item()) == (-15.0, 25.0)
    values = torch.randn(100_000) * 1e-5
    log2 = np.log2(np.abs(values.double().numpy()))
    assert histogram(values).log2_mean.item() == pytest.approx(log2.mean(), rel=1e-7)
    assert histogram(values).log2_var.item() == pytest.approx(log2.var(), rel=1e-5)
    assert histogram(torch.zeros(2)).log2_mean.isnan()


def test_merging_is_counting_together():
    first, second = torch.randn(1000) * 1e-6, random_bits(torch.float32, 3000)
    assert_same(histogram(first).merge(histogram(second)), histogram([first, second]))
    rows = histograms([[first], [second]])
    assert_same(rows.merge(rows).select(1), histogram([second, second]))


def test_what_ranks_reduce():
    ranks = [histograms([[torch.randn(50)], [torch.tensor([math.nan, 0.0, math.inf, rank])]]) for rank in (1, 2)]
    to_sum, to_max = zip(*(rank.tensors() for rank in ranks), strict=True)
    reduced = Histogram.from_tensors(sum(to_sum), torch.maximum(*to_max))
    assert_same(reduced, ranks[0].merge(ranks[1]))
    assert all(getattr(reduced, name).dtype == getattr(ranks[0], name).dtype for name in EXACT)
    assert_same(Histogram.from_tensors(*ranks[0].select(1).tensors()), ranks[0].select(1))


def test_moving_to_a_device():
    counted = histogram(torch.ones(2))
    assert all(getattr(counted.to("meta"), field.name).is_meta for field in dataclasses.fields(counted))


def test_deterministic_algorithms(monkeypatch):
    groups = mixed_groups()
    expected = histograms(groups)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(histograms(groups), expected)
        monkeypatch.setattr(stats, "_count_on_cpu", stats._count_elsewhere)
        assert_same(histograms(groups), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_way_of_a_gpu_gives_the_same(monkeypatch):
    """All that can be run of it on a CPU: sums by norms, subnormals always minded, maxima by bits, sorted counts."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    values, sizes = torch.randn(1000), [1, 0, 400, 599]
    sums = segments.sums(values.as_subclass(Elsewhere), sizes)
    torch.testing.assert_close(sums.as_subclass(torch.Tensor), segments.sums(values, sizes))
    codes = torch.randint(0, 90, (5000,), dtype=torch.int32)
    assert torch.equal(stats._count_by_sorting(codes, 100), torch.bincount(codes, minlength=100))
    plain = torch.randn(300_000)
    rows = [(0, plain[:3]), (1, plain)]
    assert torch.equal(stats._largest_by_bits(rows, 2), stats._largest(rows, 2))
    bits = stats._magnitude_bits(plain, stats._FP32)
    for function in (stats._columns, stats._log2):
        assert torch.equal(function(bits, stats._FP32, True), function(bits, stats._FP32, False))


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.fixture
    def groups(self):
        groups = mixed_groups()
        groups += [[random_bits(torch.float32, 5_000_000)], [random_bits(torch.float64)], [all_codes(torch.float16)]]
        return [*groups, [all_codes(torch.bfloat16)], [all_codes(torch.float8_e4m3fn)]]

    @pytest.fixture
    def on_gpu(self, groups):
        return [[tensor.cuda() for tensor in group] for group in groups]

    @pytest.mark.parametrize("limit", [None, 1000])
    def test_it_agrees_with_the_cpu(self, groups, on_gpu, limit):
        assert_same(histograms(on_gpu, limit).to("cpu"), histograms(groups, limit))

    def test_it_agrees_with_deterministic_algorithms(self, groups, on_gpu):
        torch.use_deterministic_algorithms(True)
        try:
            counted = histograms(on_gpu)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_same(counted.to("cpu"), histograms(groups))

    @pytest.mark.parametrize("limit", [None, 1000])
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_nothing_waits_for_the_gpu(self, on_gpu, limit, deterministic):
        torch.use_deterministic_algorithms(deterministic)
        torch.cuda.set_sync_debug_mode("error")
        try:
            counted = histograms(on_gpu, limit)
            counted.merge(counted).tensors()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.use_deterministic_algorithms(False)
        assert counted.counts.is_cuda
