"""Finds where a non-finite value comes from, in what a recorder wrote down.

An infinity may be meant (a mask of -inf that softmax absorbs), so an operation is not judged by what it makes but by
whether it reached the result: the search starts there and goes back through values that are not finite.
"""

from collections.abc import Sequence

from lightning_mixprec.evidence.instruments.recording import Value


def find_origin(values: Sequence[Value], targets: Sequence[int]) -> int | None:
    """The value with which non-finite numbers entered the computation of the targets.

    Back from a NaN to the operation that made one of something else, and then to those that made its infinities of
    finite numbers. Where such infinities were only handed in (as leaves or as plain numbers), the operation that made a
    NaN of them is at fault. The earliest operation wins; if there is none, the earliest value handed in.

    Args:
        values: all values, in order.
        targets: indices of the results, losses or gradients.

    Returns:
        An index into the values, None if all targets are finite.
    """
    starts = [place for place in targets if values[place].nans]
    if starts:
        found = {origin for root in _roots(values, starts, nans=True) for origin in _behind_nan(values, root)}
    else:
        found = _roots(values, [place for place in targets if values[place].infs], nans=False)
    return min(found, key=lambda place: (is_given(values[place]), place), default=None)


def is_given(origin: Value) -> bool:
    """True for an origin that was handed in as non-finite, rather than computed from finite numbers.

    A NaN computed from nothing but infinities that were handed in counts as computed.
    """
    if origin.call is None:
        return True
    scalars = origin.call.scalars
    return any(scalar != scalar for scalar in scalars) if origin.nans else bool(scalars)


def _behind_nan(values: Sequence[Value], root: int) -> set[int]:
    if is_given(values[root]):
        return {root}
    infinite = [place for place in values[root].inputs if values[place].infs]
    return {place for place in _roots(values, infinite, nans=False) if not is_given(values[place])} or {root}


def _roots(values: Sequence[Value], starts: Sequence[int], nans: bool) -> set[int]:
    """The first values, back from the starts, with NaNs (else: non-finite) whose inputs have none."""
    waiting, seen, roots = list(starts), set(starts), set()
    while waiting:
        place = waiting.pop()
        before = _culprits([(each, values[each]) for each in values[place].inputs], nans)
        if not before:
            roots.add(place)
        waiting += [each for each in before if each not in seen]
        seen.update(before)
    return roots


def _culprits(inputs: Sequence[tuple[int, Value]], nans: bool) -> list[int]:
    with_nans = [place for place, value in inputs if value.nans]
    if nans:
        return with_nans
    return [place for place, value in inputs if value.infs] or with_nans
