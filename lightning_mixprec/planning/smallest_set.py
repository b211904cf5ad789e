"""The smallest set of changes that is enough, in few tries.

The search is QuickXplain [1]_, which needs of the order of ``k log(n / k)`` tries to find ``k`` of ``n`` candidates,
on the shortest leading part of the candidates that is enough.

.. [1] Junker, QuickXplain: Preferred Explanations and Relaxations for Over-Constrained Problems, AAAI 2004.
"""

from collections.abc import Callable, Sequence


class _OutOfTriesError(Exception):
    """The tries are used up."""


def smallest(candidates: Sequence[str], works: Callable[[list[str]], bool], max_tries: int) -> list[str] | None:
    """Looks for a set of candidates that works and from which none can be left out.

    Whatever contains a set that works is taken to work, too. Of several such sets the one is found whose members come
    early.

    Args:
        candidates: The candidates, the likeliest first.
        works: Says whether a set is enough.
        max_tries: Calls of ``works`` at most. If these are too few, the smallest set seen to work is returned.

    Returns:
        The set, in the candidates' order; None if nothing was seen to work.

    >>> smallest(["a", "b", "c", "d"], lambda chosen: {"b", "d"} <= set(chosen), max_tries=20)
    ['b', 'd']
    """
    search = _Search(candidates, works, max_tries)
    try:
        enough = search.leading_part()
        if enough is None:
            return None
        found = search.within([], False, enough)
        return [each for each in candidates if each in found]
    except _OutOfTriesError:
        return search.best


class _Search:
    def __init__(self, candidates: Sequence[str], works: Callable[[list[str]], bool], max_tries: int) -> None:
        self._candidates, self._works = list(candidates), works
        self._tries_left = max_tries
        self._known: dict[frozenset[str], bool] = {}
        self.best: list[str] | None = None

    def leading_part(self) -> list[str] | None:
        """The shortest leading part that works, of 1, 2, 4 ... candidates."""
        length = 1
        while length < len(self._candidates):
            if self._is_enough(self._candidates[:length]):
                return self._candidates[:length]
            length *= 2
        return self._candidates if self._is_enough(self._candidates) else None

    def within(self, background: list[str], has_grown: bool, candidates: list[str]) -> list[str]:
        """The candidates that are needed, of some that are enough together with the background."""
        if has_grown and self._is_enough(background):
            return []
        if len(candidates) == 1:
            return candidates
        first, second = candidates[: len(candidates) // 2], candidates[len(candidates) // 2 :]
        of_second = self.within(background + first, bool(first), second)
        of_first = self.within(background + of_second, bool(of_second), first)
        return of_first + of_second

    def _is_enough(self, chosen: list[str]) -> bool:
        key = frozenset(chosen)
        if key not in self._known:
            if not self._tries_left:
                raise _OutOfTriesError
            self._tries_left -= 1
            self._known[key] = self._works(chosen)
            if self._known[key] and (self.best is None or len(chosen) < len(self.best)):
                self.best = [each for each in self._candidates if each in key]
        return self._known[key]
