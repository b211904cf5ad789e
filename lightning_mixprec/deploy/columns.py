"""The columns of a comparison that are about outputs: their SQNR, equal decisions, metrics, and what a step logs."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_mixprec.deploy.evaluated_steps import Logged
from lightning_mixprec.deploy.prepared import GivenBatch
from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.numerics.similarity import decibels, energies

_TARGETS = ("target", "targets", "label", "labels", "y")


def floats_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output, on the CPU, in fp64 where they are and in fp32 elsewhere."""
    floats = (each.detach() for each in tensors_in(output) if each.is_floating_point() and each.layout == torch.strided)
    return [(each if each.dtype == torch.float64 else each.float()).cpu() for each in floats]


def main_output(output: Any) -> Tensor | None:
    """The tensor that an output is about: its ``logits`` if it has some, else its first floating-point tensor."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named.detach()
    return next((each.detach() for each in tensors_in(output) if each.is_floating_point()), None)


def decisions_of(output: Any, batch: Any) -> Tensor | None:
    """The argmax of each of an output's logits, on the CPU; None where the output is not logits.

    Logits are what the batch has whole numbers for: a tensor of the output's shape without its classes (dimension 1,
    as ``cross_entropy`` has it, or the last one), none larger than there are classes.
    """
    logits = main_output(output)
    if logits is None or logits.dim() < 2:
        return None
    whole = [each for each in tensors_in(batch) if not each.is_floating_point() and not each.is_complex()]
    for dim in (1, -1):
        classes, shape = logits.shape[dim], list(logits.shape)
        del shape[dim]
        if classes > 1 and any(list(each.shape) == shape and _are_classes(each, classes) for each in whole):
            return logits.argmax(dim).cpu()
    return None


def _are_classes(tensor: Tensor, classes: int) -> bool:
    return tensor.dtype != torch.bool and (tensor.numel() == 0 or int(tensor.max()) < classes)


Told = tuple[list[Tensor], Tensor | None]
"""What is looked at of an output: its floating-point tensors, and its decisions."""


class Likeness:
    """What outputs have in common with the reference's, batch by batch."""

    def __init__(self) -> None:
        self._signal = torch.zeros((), dtype=torch.float64)
        self._noise = torch.zeros((), dtype=torch.float64)
        self._elements = self._equal = self._decided = 0

    def add(self, expected: Told, floats: list[Tensor], decisions: Tensor | None) -> None:
        """Takes in a batch: tensors and decisions of the reference, and those of a policy."""
        for exact, other in zip(expected[0], floats, strict=False):
            if exact.shape == other.shape:
                signal, noise = energies(*(each.flatten().double() for each in (exact, other)))
                self._signal, self._noise = self._signal + signal, self._noise + noise
                self._elements += exact.numel()
        if decisions is not None and expected[1] is not None and decisions.shape == expected[1].shape:
            self._equal += int((decisions == expected[1]).sum())
            self._decided += decisions.numel()

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise of all outputs, in decibels; None without any."""
        return float(decibels(self._signal, self._noise)) if self._elements else None

    @property
    def equal_decisions(self) -> float | None:
        """The share of decisions that are the reference's; None where outputs are not logits."""
        return self._equal / self._decided if self._decided else None


class Metrics:
    """Metrics of one policy: torchmetrics' as they are computed over all batches, of functions the mean.

    Args:
        metric: A torchmetrics metric or collection, a function of outputs and batch, a mapping of names to these, or
            None.

    Raises:
        MixPrecError: It is none of these.
    """

    def __init__(self, metric: Any) -> None:
        named = metric if isinstance(metric, Mapping) and not _is_metric(metric) else {_name_of(metric): metric}
        self._metrics = {name: _own(name, each) for name, each in named.items() if each is not None}
        self._sums: dict[str, list[float]] = {}

    def add(self, output: Any, batch: Any, device: torch.device) -> None:
        """Takes in a batch."""
        for name, metric in self._metrics.items():
            if not _is_metric(metric):
                self._sums.setdefault(name, []).append(_number(name, metric(output, batch)))
                continue
            main = main_output(output)
            if main is None:
                raise MixPrecError(f"metric {name!r} has no output to look at; give a function of outputs and batch.")
            metric.to(device).update(main if main.dtype == torch.float64 else main.float(), _target_of(name, batch))

    def values(self) -> dict[str, float]:
        """By column its value."""
        found = {name: sum(values) / len(values) for name, values in self._sums.items()}
        for name, metric in self._metrics.items():
            if _is_metric(metric):
                computed = metric.compute()
                parts = computed if isinstance(computed, Mapping) else {name: computed}
                found |= {part: _number(part, value) for part, value in parts.items()}
        return found


def _is_metric(metric: Any) -> bool:
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def _own(name: str, metric: Any) -> Any:
    if _is_metric(metric):
        own = copy.deepcopy(metric)
        own.reset()
        return own
    if callable(metric):
        return metric
    raise MixPrecError(
        f"metric {name!r} is a {type(metric).__name__}; give a torchmetrics metric, a function of outputs and batch, "
        "or a mapping of names to these."
    )


def _name_of(metric: Any) -> str:
    name: str = getattr(metric, "__name__", type(metric).__name__)
    return "metric" if name == "<lambda>" else name


def _target_of(name: str, batch: Any) -> Tensor:
    if isinstance(batch, (list, tuple)) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    if isinstance(batch, Mapping):
        for key in _TARGETS:
            if isinstance(batch.get(key), Tensor):
                found: Tensor = batch[key]
                return found
    raise MixPrecError(
        f"metric {name!r} needs targets, and a batch is neither a pair of inputs and targets nor a mapping with "
        f"{', '.join(_TARGETS)}; give a function of outputs and batch."
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    said = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise MixPrecError(f"metric {name!r} gives {said}; a column takes one number.")


_REDUCED: dict[str, Callable[[Sequence[float], Sequence[int]], float]] = {
    "mean": lambda values, sizes: sum(map(float.__mul__, values, map(float, sizes))) / max(sum(sizes), 1),
    "sum": lambda values, sizes: sum(values),
    "min": lambda values, sizes: min(values),
    "max": lambda values, sizes: max(values),
}


class LoggedColumns:
    """What validation steps log, reduced over batches as Lightning does at the end of an epoch.

    Args:
        several: Whether there are several loaders, so that names tell which.
    """

    def __init__(self, several: bool) -> None:
        self._several = several
        self._values: dict[str, list[tuple[Any, int]]] = {}
        self._reduce: dict[str, Any] = {}

    def add(self, logged: Mapping[str, Logged], given: GivenBatch | None = None) -> None:
        """Takes in what a step logged, or a hook around the steps."""
        for name, each in logged.items():
            column = f"{name}/dataloader_idx_{given.loader}" if self._several and given is not None else name
            size = 1 if given is None else each.size or _size_of(given.batch)
            value = each.value if _is_metric(each.value) else float(each.value)
            self._values.setdefault(column, []).append((value, size))
            self._reduce[column] = each.reduce

    def values(self) -> dict[str, float]:
        """By column its value; within the sandbox, as metrics of the module are computed here."""
        return {name: self._reduced(name, values) for name, values in self._values.items()}

    def _reduced(self, name: str, values: list[tuple[Any, int]]) -> float:
        if _is_metric(values[-1][0]):
            return _number(name, values[-1][0].compute())
        numbers, sizes = [value for value, _ in values], [size for _, size in values]
        reduce = self._reduce[name]
        if callable(reduce):
            return float(reduce(torch.tensor(numbers)))
        return _REDUCED[reduce](numbers, sizes)


def _size_of(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except Exception:  # Lightning raises where it finds no tensor
        return 1


def all_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of rows, each once, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))
