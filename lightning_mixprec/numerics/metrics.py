"""Statistics of numbers as torchmetrics: they sum over batches and processes, log, and draw themselves.

>>> import lightning.pytorch as pl
>>> class Watched(pl.LightningModule):
...     def __init__(self):
...         super().__init__()
...         self.layer = torch.nn.Linear(4, 1)
...         self.lost = UnderflowRate("fp16", scale=1024.0)
...
...     def on_after_backward(self):
...         self.lost.update([param.grad for param in self.parameters()])
...         self.log("lost", self.lost, on_epoch=True)
"""

import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics.exponents import FIELDS, HIGHEST, LOWEST, Histogram, histogram
from lightning_mixprec.numerics.flat_batches import flatten, flatten_together
from lightning_mixprec.numerics.formats import Format, get_format
from lightning_mixprec.numerics.plots import draw_exponents
from lightning_mixprec.numerics.rates import overflows, underflows
from lightning_mixprec.numerics.similarity import decibels, energies

if TYPE_CHECKING:
    from lightning_mixprec.numerics.plots import Axes, FigureBase

_CHUNK = 1 << 22  # elements; bounds the memory that a large tensor's temporaries take


class _Counter(Metric):
    """A metric whose states stay int64 and float64, whatever the model around it is cast to."""

    is_differentiable = False
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Move the states as any module's, but leave out casts: torchmetrics' own guard lets some of them through."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, exclude_state)


class ExponentHistogram(_Counter):
    """Counts of numbers by their binary exponent, before any cast.

    Args:
        **kwargs: options of every ``torchmetrics.Metric``.

    >>> metric = ExponentHistogram()
    >>> metric.update([torch.tensor([0.0, 1.0, 1.5]), torch.tensor([-3.0, float("inf")])])
    >>> result = metric.compute()
    >>> {e: n for e, n in zip(result["exponent"].tolist(), result["count"].tolist()) if n}
    {0: 2, 1: 1}
    >>> result["zero"], result["inf"], result["amax"]
    (tensor(1), tensor(1), tensor(3., dtype=torch.float64))
    """

    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        empty = histogram([])
        for name in FIELDS:
            self.add_state(name, getattr(empty, name), dist_reduce_fx="max" if name == "amax" else "sum")

    def update(self, tensors: Tensor | Iterable[Tensor]) -> None:
        """Count the elements of a tensor, or of several.

        Args:
            tensors: floating-point or complex tensors of any shape, dtype and device; also empty ones.

        Raises:
            FormatError: a tensor holds no floating-point numbers.
        """
        so_far = self.histogram
        merged = so_far.merge(histogram(_listed(tensors)).to(so_far.counts.device))
        for name in FIELDS:
            setattr(self, name, getattr(merged, name))

    def compute(self) -> dict[str, Tensor]:
        """All that was counted, in tensors whose shapes never change.

        Returns:
            ``exponent`` and ``count``, int64 [384]: so many finite numbers in ``[2**exponent, 2**(exponent + 1))``,
            what lies outside counted in the first or last; ``zero``, ``inf``, ``nan`` and ``elements``, int64;
            ``amax``, fp64, the largest finite magnitude; ``log2_mean`` and ``log2_var``, fp64, mean and variance of
            log2 of the finite magnitudes other than zero, NaN without any.
        """
        seen = self.histogram
        return {
            "exponent": torch.arange(LOWEST, HIGHEST + 1, device=seen.counts.device),
            "count": seen.by_exponent,
            "zero": seen.zeros,
            "inf": seen.infs,
            "nan": seen.nans,
            "elements": seen.elements,
            "amax": seen.amax,
            "log2_mean": seen.log2_mean,
            "log2_var": seen.log2_var,
        }

    @property
    def histogram(self) -> Histogram:
        """The histogram so far, as the functions of :mod:`lightning_mixprec.numerics.rates` take it.

        That of this process; of all processes inside ``with metric.sync_context():``.
        """
        return Histogram(**{name: getattr(self, name) for name in FIELDS})

    def plot(self, val: dict[str, Tensor] | None = None, ax: "Axes | None" = None) -> "tuple[FigureBase | None, Axes]":
        """Draw one bar per exponent, and above them what the formats hold: full precision thick, subnormals thin.

        Args:
            val: what ``compute`` or ``forward`` returned; by default the result so far.
            ax: the axes to draw in; by default those of a new figure.

        Returns:
            The figure and the axes.

        Raises:
            SupportError: matplotlib is not installed.
        """
        return draw_exponents(self.compute() if val is None else val, ax)


class _Scalar(_Counter):
    """A metric of one number."""

    def plot(
        self, val: "Tensor | Sequence[Tensor] | None" = None, ax: "Axes | None" = None
    ) -> "tuple[FigureBase | None, Axes]":
        """Draw one result, or several as a series.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of that; by default the result so far.
            ax: the axes to draw in; by default those of a new figure.

        Returns:
            The figure (None if ``ax`` was given) and the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return cast("tuple[FigureBase | None, Axes]", self._plot(val, ax))


class _Rate(_Scalar):
    """A share of the elements seen: two counts, which are summed over batches and processes."""

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    _counted: Callable[[Tensor, Format, float], tuple[Tensor, Tensor]]
    """The number of elements that count, and that of all."""

    def __init__(self, format: str = "fp16", scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.format = get_format(format).name
        self.scale = _checked_scale(scale)
        # A MetricCollection lets metrics share their states if these have the same names and, after the first batch,
        # the same values; with another format or scale they would differ only later.
        self._state = f"{type(self).__name__}_{self.format}_{self.scale!r}".lower().replace(".", "_")
        self.add_state(self._state, torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The share of all elements so far that counts, as 0-dim fp32; 0 where nothing was seen."""
        part, whole = self._counts.double().unbind()
        return (part / whole.clamp(min=1)).float()

    def update(self, tensors: Tensor | Iterable[Tensor]) -> None:
        """Count the elements of a tensor, or of several.

        Args:
            tensors: floating-point or complex tensors of any shape, dtype and device; also empty ones.

        Raises:
            FormatError: a tensor holds no floating-point numbers.
        """
        counts, target = self._counts, get_format(self.format).forward
        for tensor in [flatten(tensor) for tensor in _listed(tensors)]:
            for chunk in tensor.split(_CHUNK):
                counts = counts + torch.stack(self._counted(chunk, target, self.scale)).to(counts.device)
        setattr(self, self._state, counts)

    @property
    def _counts(self) -> Tensor:
        counts: Tensor = getattr(self, self._state)
        return counts


class UnderflowRate(_Rate):
    """The share of the non-zero finite numbers that a format, after scaling, would round to zero.

    Exact for every scale: the products are compared as real numbers and rounded once, ties to even.

    Args:
        format: a format's name; ``"fp8"`` means its forward format, e4m3 (gradients: ``"e5m2"``).
        scale: what the numbers are multiplied by before the cast, as a loss scale does.
        **kwargs: options of every ``torchmetrics.Metric``.

    Raises:
        FormatError: the format is unknown, or the scale is no positive finite number.

    >>> rate = UnderflowRate("fp16")
    >>> rate.update(torch.tensor([0.0, 2.0**-25, 2.0**-24, 1.0, float("inf")]))
    >>> rate.compute()
    tensor(0.3333)
    """

    _counted = staticmethod(underflows)


class OverflowRate(_Rate):
    """The share of all numbers that, after scaling, is infinite or NaN in a format.

    What was infinite or NaN before counts too. Exact for every scale: the products are compared as real numbers and
    rounded once, ties to even.

    Args:
        format: a format's name; ``"fp8"`` means its forward format, e4m3 (gradients: ``"e5m2"``).
        scale: what the numbers are multiplied by before the cast, as a loss scale does.
        **kwargs: options of every ``torchmetrics.Metric``.

    Raises:
        FormatError: the format is unknown, or the scale is no positive finite number.

    >>> rate = OverflowRate("fp16")
    >>> rate(torch.tensor([1.0, 65519.0, 65520.0, float("nan")]))
    tensor(0.5000)
    """

    _counted = staticmethod(overflows)


class SQNR(_Scalar):
    """Signal-to-quantization-noise ratio in dB: energy of a reference over energy of what an approximation misses.

    ``10 * log10(sum(reference**2) / sum((reference - approximation)**2))`` over everything seen, in fp64. Infinite
    where all is equal; minus infinity where only the approximation holds infinities or NaNs, or only the reference is
    all zeros; NaN where the reference is not finite or nothing was seen. As
    :func:`~lightning_mixprec.numerics.similarity.sqnr_db`, which compares two tensors once.

    Args:
        **kwargs: options of every ``torchmetrics.Metric``.

    >>> sqnr = SQNR()
    >>> reference = torch.tensor([3.0, 4.0])
    >>> sqnr(reference, reference + 0.5), sqnr(reference, reference), sqnr.compute()
    (tensor(16.9897), tensor(inf), tensor(20.))
    """

    higher_is_better = True

    signal: Tensor
    noise: Tensor
    elements: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("signal", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("noise", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("elements", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, reference: Tensor | Iterable[Tensor], approximation: Tensor | Iterable[Tensor]) -> None:
        """Add the energies of a reference and of its difference from an approximation, or of several.

        Args:
            reference: floating-point or complex tensors of any shape and dtype; also empty ones.
            approximation: as many tensors of the same shapes, of any floating-point or complex dtype.

        Raises:
            FormatError: numbers or shapes of tensors differ, or a tensor holds no floating-point numbers.
        """
        references, approximations = _listed(reference), _listed(approximation)
        if len(references) != len(approximations):
            raise FormatError(f"cannot compare {len(references)} tensors with {len(approximations)}")
        pairs = [flatten_together(*pair) for pair in zip(references, approximations, strict=True)]
        for exact, approximate in pairs:
            signal, noise = energies(exact, approximate)
            self.elements = self.elements + exact.numel()
            self.signal = self.signal + signal.to(self.signal.device)
            self.noise = self.noise + noise.to(self.noise.device)

    def compute(self) -> Tensor:
        """The ratio over everything so far, in dB, as 0-dim fp32."""
        return decibels(self.signal, self.noise).where(self.elements > 0, torch.nan).float()


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return list(tensors) if isinstance(tensors, Iterable) and not isinstance(tensors, Tensor) else [tensors]


def _checked_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not 0 < scale <= sys.float_info.max:
        raise FormatError(f"scale must be a positive finite number, not {scale!r}")
    return float(scale)
