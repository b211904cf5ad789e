"""Contractions: functions of torch that are made of products, taken apart into them.

Each calls functions of torch in its turn, which are replaced where they are called: autocast says of each what dtype it
computes in, as it does of torch's own parts.
"""

import functools
import math
import string
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Label = str | int
"""A letter of an equation; a dimension of its ellipsis is a number, counted from the last one."""


def einsum(*args: Any) -> Any:
    """``torch.einsum``, two operands at a time from left to right.

    Args:
        args: An equation and the operands, or their list; or each operand with a list of numbers for its dimensions,
            and, if it is wanted, the list of the result.
    """
    equation, operands = (args[0], args[1:]) if isinstance(args[0], str) else _written(args)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    parsed = _parsed(equation, operands)
    if parsed is None:
        return NotImplemented
    inputs, output = parsed
    terms = [_diagonal(tensor, labels) for tensor, labels in zip(operands, inputs, strict=True)]
    while len(terms) > 1:
        needed = {*output, *(label for _, labels in terms[2:] for label in labels)}
        terms[:2] = [_contracted(terms[0], terms[1], needed)]
    tensor, labels = _summed(*terms[0], set(output))
    return tensor.permute([labels.index(label) for label in output])


def _written(args: Sequence[Any]) -> tuple[str, Sequence[Tensor]]:
    """The equation in letters of one that is given in numbers: capitals first, as torch counts."""

    def text(numbers: Sequence[Any]) -> str:
        letters = string.ascii_uppercase + string.ascii_lowercase
        return "".join("..." if number is ... else letters[number] for number in numbers)

    equation = ",".join(text(numbers) for numbers in args[1::2])
    has_result = len(args) % 2 == 1
    return (f"{equation}->{text(args[-1])}" if has_result else equation), args[: len(args) - has_result : 2]


def _parsed(equation: str, operands: Sequence[Tensor]) -> tuple[list[list[Label]], list[Label]] | None:
    """The labels of each operand and of the result; None for what torch has an error for."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    written = left.split(",")
    if len(written) != len(operands):
        return None
    inputs = [_labels(text, tensor.dim()) for text, tensor in zip(written, operands, strict=True)]
    if any(labels is None for labels in inputs):
        return None
    known = [label for labels in inputs for label in labels or ()]
    dots = sorted({label for label in known if isinstance(label, int)})
    if arrow:
        head, ellipsis, tail = right.partition("...")
        output: list[Label] = [*head, *(dots if ellipsis else ()), *tail]
    else:
        output = [*dots, *sorted(label for label in known if isinstance(label, str) and known.count(label) == 1)]
    is_valid = len(set(output)) == len(output) and set(output) <= set(known)
    return ([labels or [] for labels in inputs], output) if is_valid else None


def _labels(text: str, dims: int) -> list[Label] | None:
    head, ellipsis, tail = text.partition("...")
    hidden = dims - len(head) - len(tail)
    is_valid = all(letter.isalpha() for letter in head + tail) and (hidden >= 0 if ellipsis else hidden == 0)
    return [*head, *range(-hidden, 0), *tail] if is_valid else None


def _diagonal(tensor: Tensor, labels: list[Label]) -> tuple[Tensor, list[Label]]:
    """A tensor with a dimension for each label, once."""
    labels = list(labels)
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            first = labels.index(label)
            second = labels.index(label, first + 1)
            tensor = tensor.diagonal(dim1=first, dim2=second)
            labels = [each for place, each in enumerate(labels) if place not in (first, second)] + [label]
    return tensor, labels


def _summed(tensor: Tensor, labels: list[Label], needed: set[Label]) -> tuple[Tensor, list[Label]]:
    gone = [place for place, label in enumerate(labels) if label not in needed]
    return (tensor.sum(gone) if gone else tensor), [label for label in labels if label in needed]


def _longer_than_one(tensor: Tensor, labels: list[Label]) -> set[Label]:
    return {label for label, size in zip(labels, tensor.shape, strict=True) if size != 1}


def _contracted(
    one: tuple[Tensor, list[Label]], other: tuple[Tensor, list[Label]], needed: set[Label]
) -> tuple[Tensor, list[Label]]:
    """The product of two operands, summed over the labels of both that nobody needs any more.

    Where one of them has size 1, the other is summed before, as torch does: autocast leaves sums alone.
    """
    kept = needed | (_longer_than_one(*one) & _longer_than_one(*other))
    (a, of_a), (b, of_b) = _summed(*one, kept), _summed(*other, kept)
    batch = [label for label in of_a if label in of_b and label in needed]
    summed = [label for label in of_a if label in of_b and label not in needed]
    left, right = [label for label in of_a if label not in of_b], [label for label in of_b if label not in of_a]
    size = {label: max(a.shape[of_a.index(label)], b.shape[of_b.index(label)]) for label in (*batch, *summed)}
    a = _arranged(a, of_a, (batch, left, summed), size)
    b = _arranged(b, of_b, (batch, summed, right), size)
    shape = [*a.shape[: len(batch) + len(left)], *b.shape[b.dim() - len(right) :]]
    if not summed:
        a = a.reshape([*a.shape, *[1] * len(right)])
        b = b.reshape([*b.shape[: len(batch)], *[1] * len(left), *b.shape[len(batch) :]])
        return a * b, [*batch, *left, *right]
    count, rows = math.prod(a.shape[: len(batch)]), math.prod(a.shape[len(batch) : len(batch) + len(left)])
    length, columns = math.prod([size[label] for label in summed]), math.prod(b.shape[len(batch) + len(summed) :])
    result = torch.bmm(a.reshape(count, rows, length), b.reshape(count, length, columns))
    return result.reshape(shape), [*batch, *left, *right]


def _arranged(tensor: Tensor, labels: list[Label], groups: Iterable[list[Label]], size: dict[Label, int]) -> Tensor:
    """A tensor with its dimensions in another order, those of size 1 that another operand has longer expanded."""
    order = [label for group in groups for label in group]
    tensor = tensor.permute([labels.index(label) for label in order])
    return tensor.expand([size.get(label, -1) for label in order])


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Any:
    """``torch.tensordot`` over as many last and first dimensions as a number says, or over those that are listed."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = range(a.dim() - dims, a.dim()), range(dims)
    over_a, over_b = ([dim % tensor.dim() for dim in each] for each, tensor in zip(dims, (a, b), strict=True))
    left = [dim for dim in range(a.dim()) if dim not in over_a]
    right = [dim for dim in range(b.dim()) if dim not in over_b]
    shape = [*(a.shape[dim] for dim in left), *(b.shape[dim] for dim in right)]
    sizes = [a.shape[dim] for dim in over_a], [b.shape[dim] for dim in over_b]
    if sizes[0] != sizes[1]:
        return NotImplemented
    length = math.prod(sizes[0])
    rows = a.permute(*left, *over_a).reshape(math.prod([a.shape[dim] for dim in left]), length)
    columns = b.permute(*over_b, *right).reshape(length, math.prod([b.shape[dim] for dim in right]))
    return torch.mm(rows, columns).reshape(shape)


def inner(input: Tensor, other: Tensor) -> Any:
    """``torch.inner``: over the last dimension of both."""
    if input.dim() == other.dim() == 1:
        return torch.dot(input, other)
    return tensordot(input, other, ([-1], [-1])) if input.dim() and other.dim() else input * other


def multi_dot(tensors: Sequence[Tensor]) -> Any:
    """``torch.linalg.multi_dot``, from left to right, or from right to left where the last one is a vector."""
    if tensors[-1].dim() == 1:
        return functools.reduce(lambda result, tensor: torch.matmul(tensor, result), reversed(tensors))
    return functools.reduce(torch.matmul, tensors)


def conv_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Any:
    """``torch.conv_tbc``: a convolution over the first dimension of (time, batch, channels)."""
    return torch.conv1d(input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)
