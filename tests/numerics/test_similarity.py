"""Signal to noise and cosines against NumPy, torch and real casts."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics import flat_batches as segments
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.numerics.rounding import round_to
from lightning_mixprec.numerics.similarity import cosine_of, dots, sqnr_db

NORMAL = torch.randn(300_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "decibels"), [("fp16", 73.6), ("bf16", 55.6), ("e4m3", 31.5), ("e5m2", 25.5)])
def test_sqnr_of_rounded_normal_numbers(name, decibels):
    assert sqnr_db(NORMAL, round_to(NORMAL, name)).item() == pytest.approx(decibels, abs=0.3)
    assert sqnr_db(NORMAL, NORMAL.to(get_format(name).dtype)).item() == pytest.approx(decibels, abs=0.3)


def test_sqnr_agrees_with_numpy_whatever_the_layout():
    reference = torch.randn(4, 6, 5, 3)
    approximation = (reference + 0.01 * torch.randn_like(reference)).to(memory_format=torch.channels_last)
    exact, error = reference.double().numpy(), (reference.double() - approximation.double()).numpy()
    expected = 10 * np.log10(np.square(exact).sum() / np.square(error).sum())
    assert sqnr_db(reference, approximation).item() == pytest.approx(expected, rel=1e-12)
    assert sqnr_db(reference[:, ::2], reference[:, ::2] * 1.1).item() == pytest.approx(20, abs=1e-5)


@pytest.mark.parametrize(
    ("reference", "approximation", "decibels"),
    [
        ([1.0, 2.0], [1.0, 2.0], math.inf),
        ([0.0, 0.0], [0.0, -0.0], math.inf),
        ([0.0], [1.0], -math.inf),
        ([1.0, 2.0], [1.0, math.inf], -math.inf),
        ([1.0, 2.0], [1.0, math.nan], -math.inf),
        ([0.0], [math.nan], -math.inf),
        ([1.0, math.inf], [1.0, math.inf], math.nan),
        ([math.nan], [1.0], math.nan),
        ([], [], math.nan),
        ([3e38, 3e38], [0.0, 0.0], 0.0),
        ([1e-44], [0.0], 0.0),
        ([10.0], [11.0], 20.0),
    ],
)
def test_sqnr_at_its_ends(reference, approximation, decibels):
    found = sqnr_db(torch.tensor(reference), torch.tensor(approximation))
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert found.item() == pytest.approx(decibels, nan_ok=True)


def pairs():
    torch.manual_seed(0)
    shapes = [(3, 4), (), (300, 301), (0,), (64, 3, 7, 7), (70_000,), (2, 5)]
    first = [torch.randn(shape) * 1e-3 for shape in shapes]
    second = [tensor + torch.randn(tensor.shape) * 1e-3 for tensor in first]
    second[1] = second[1].half()
    second[4] = second[4].to(memory_format=torch.channels_last)
    first[6], second[6] = first[6].bfloat16(), second[6].bfloat16()
    return first, second


def numpy_dots(first, second):
    flat = [tuple(t.double().numpy().ravel() for t in pair) for pair in zip(first, second, strict=True)]
    return np.array([[a @ b, a @ a, b @ b] for a, b in flat])


def test_dots_agree_with_numpy():
    first, second = pairs()
    np.testing.assert_allclose(dots(first, second).numpy(), numpy_dots(first, second), rtol=1e-12, atol=1e-20)


def test_cosines_agree_with_torch_by_layer_and_in_all():
    first, second = pairs()
    parts = dots(first, second)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.numel():
            expected = torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
            torch.testing.assert_close(cosine_of(parts)[row], expected)
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (first, second))
    torch.testing.assert_close(cosine_of(parts.sum(0)), torch.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(
    ("first", "second", "cosine"),
    [
        ([1.0, 0.0], [2.0, 0.0], 1.0),
        ([1.0, 0.0], [-2.0, 0.0], -1.0),
        ([1.0, 0.0], [0.0, 5.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([], [], 1.0),
        ([math.inf, 1.0], [0.5, 1.0], math.nan),
        ([math.nan], [1.0], math.nan),
        ([math.inf], [0.0], math.nan),
        ([1e-40, 1e-40], [1e30, 1e30], 1.0),
        ([3e38, 3e38], [3e38, 3e38], 1.0),
    ],
)
def test_cosines_at_their_ends(first, second, cosine):
    found = cosine_of(dots([torch.tensor(first)], [torch.tensor(second)]))
    assert found.tolist() == [pytest.approx(cosine, nan_ok=True)]
    assert not found.abs() > 1


def test_the_cosine_of_long_vectors_does_not_overflow():
    assert cosine_of(torch.tensor([1e200, 1e200, 1e200], dtype=torch.float64)).item() == pytest.approx(1)


def test_the_cosine_of_two_ranks_with_the_same_data_is_that_of_one():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1000, 5, generator=generator) for _ in range(2))
    parts = torch.cat([dots([x], [y]) for x, y in zip(a, b, strict=True)])
    assert torch.equal(cosine_of(parts), cosine_of(2 * parts))
    assert torch.equal(cosine_of(parts), cosine_of(8 * parts))


def test_no_tensors_have_no_dots():
    assert dots([], []).shape == (0, 3)


def test_complex_and_sparse_tensors_are_compared_by_their_numbers():
    values = torch.randn(5, dtype=torch.complex64)
    assert dots([values], [values])[0, 0].item() == pytest.approx(values.abs().square().sum().item())
    sparse = torch.sparse_coo_tensor([[1, 1, 3]], [2.0, 1.0, 4.0], (5,), check_invariants=True)
    assert dots([sparse], [torch.ones(5)]).tolist() == [[7.0, 25.0, 5.0]]


def test_sums_over_uneven_stretches():
    values, sizes = torch.randn(1000), [1, 400, 0, 599]
    expected = torch.stack([part.double().sum() for part in values.split(sizes)])
    torch.testing.assert_close(segments.sums(values, sizes), expected)


def test_nothing_builds_a_graph_or_changes_its_input():
    first, second = (torch.randn(5, requires_grad=True) for _ in range(2))
    copies = first.clone(), second.clone()
    for found in (sqnr_db(first, second), dots([first], [second])):
        assert not found.requires_grad
    assert torch.equal(first, copies[0])
    assert torch.equal(second, copies[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sqnr_db(torch.ones(2), torch.ones(1)), r"shape \(2,\) with shape \(1,\)"),
        (lambda: dots([torch.ones(2)], [torch.ones(2, 1)]), r"shape \(2,\) with shape \(2, 1\)"),
        (lambda: dots([torch.ones(2)], []), "1 tensors with 0"),
        (lambda: sqnr_db(torch.ones(2), torch.ones(2).long()), "torch.int64"),
    ],
)
def test_wrong_arguments_are_answered_in_one_line(call, message):
    with pytest.raises(FormatError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_gpu_agrees_and_is_not_waited_for():
    first, second = pairs()
    on_gpu = [[tensor.cuda() for tensor in tensors] for tensors in (first, second)]

    def measured(first, second):
        cosines = cosine_of(dots(first, second))
        return [*itertools.starmap(sqnr_db, zip(first, second, strict=True)), *cosines]

    torch.cuda.set_sync_debug_mode("error")
    try:
        found = measured(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for here, there in zip(measured(first, second), found, strict=True):
        torch.testing.assert_close(there.cpu(), here, equal_nan=True)
