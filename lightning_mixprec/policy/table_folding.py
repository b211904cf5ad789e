"""Folding the rows of a big assignment until they fit a screen or two.

Repeated blocks are folded first, then layers that get what the layer around them gets, and whatever is deepest last.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

MAX_UNFOLDED = 20
MAX_ROWS = 45
_MAX_SIBLINGS = 20
_NUMBERED = re.compile(r"(.*?)(\d*)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """A line of the table: a layer, or several that are alike.

    Attributes:
        name: The layer's name, or a pattern for several.
        type_name: The name of its class, or where the same layer stands already.
        parameters: The number of its own parameters; None if they are not initialised yet.
        is_tied: Whether it has parameters that are counted elsewhere.
        formats: Its formats.
        rule: The label of the rule that decided.
    """

    name: str
    type_name: str
    parameters: int | None
    is_tied: bool
    formats: str
    rule: str


@dataclass
class _Branch:
    """A row and the rows below it.

    Attributes:
        label: The last segment of its name.
        row: The row.
        children: The rows below it.
        layers: The number of layers that it stands for.
        copies: The number of layers alike that were merged.
    """

    label: str
    row: Row
    children: list["_Branch"] = field(default_factory=list)
    layers: int = 1
    copies: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        return (self.row.formats, self.row.rule)


def fold(rows: Iterable[Row]) -> list[Row]:
    """Folds the rows of a big model, to ``MAX_ROWS`` at most; those of a small one stay. If all are alike, one is left.

    The parameters of all rows add up to the same as before, unless some are not initialised yet.

    Args:
        rows: A row for each layer, parents first, from the model itself (``""``) on.
    """
    root = _grow(rows)
    if len({branch.key for branch in _walk(root)}) == 1:
        root = _absorb_alike(root)
    if _size(root) > MAX_UNFOLDED:
        root = _merge(root, lambda last, number: last + 1 == number)
    if _size(root) > MAX_ROWS:
        root = _absorb_alike(root)
    if _size(root) > MAX_ROWS:
        root = _merge(root, lambda last, number: True)
    return list(_rows(_prune(root, MAX_ROWS), ""))


def _grow(rows: Iterable[Row]) -> _Branch:
    branches: dict[str, _Branch] = {}
    for row in rows:
        prefix, _, label = row.name.rpartition(".")
        branches[row.name] = _Branch(label, row)
        if row.name:
            branches[prefix].children.append(branches[row.name])
    return branches[""]


def _size(branch: _Branch) -> int:
    return sum(1 for _ in _walk(branch))


def _walk(branch: _Branch) -> Iterator[_Branch]:
    waiting = [branch]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += current.children


def _merge(root: _Branch, belongs: Callable[[int, int], bool]) -> _Branch:
    """Numbered siblings that are alike all the way down become one, if the number of each belongs to the last one's.

    ``0`` to ``11`` become ``[0:12]``, every second of them ``[0:12:2]``, blocks ``layer_0`` to ``layer_11`` become
    ``layer_{0..11}``, and irregular ones a list.
    """
    known: dict[object, int] = {}

    def visit(branch: _Branch) -> tuple[_Branch, int]:
        visited = [visit(child) for child in branch.children]
        shape = (branch.key, branch.row.type_name, branch.row.parameters, branch.row.is_tied)
        below = tuple((child.label, number) for (_, number), child in zip(visited, branch.children, strict=True))
        signature = known.setdefault((shape, below), len(known))
        return replace(branch, children=_merge_siblings(visited, belongs)), signature

    return visit(root)[0]


def _merge_siblings(visited: list[tuple[_Branch, int]], belongs: Callable[[int, int], bool]) -> list[_Branch]:
    runs: list[list[_Branch]] = []
    latest: dict[tuple[int, str], list[_Branch]] = {}
    for branch, signature in visited:
        stem, number = _stem_and_number(branch)
        run = latest.get((signature, stem))
        last = _stem_and_number(run[-1])[1] if run else None
        if run and last is not None and number is not None and belongs(last, number):
            run.append(branch)
        else:
            runs.append([branch])
            if number is not None:
                latest[signature, stem] = runs[-1]
    return [
        _merged(run, _label(_stem_and_number(run[0])[0], _numbers(run))) if len(run) > 1 else run[0] for run in runs
    ]


def _stem_and_number(branch: _Branch) -> tuple[str, int | None]:
    """Takes a label apart; a number at its end counts only for a block: layers ``conv1`` and ``conv2`` are two."""
    stem, digits = _NUMBERED.fullmatch(branch.label).groups()  # type: ignore[union-attr]
    return stem, int(digits) if digits and (not stem or branch.layers > 1 or branch.children) else None


def _numbers(run: list[_Branch]) -> list[int]:
    return [number for branch in run if (number := _stem_and_number(branch)[1]) is not None]


def _label(stem: str, numbers: list[int]) -> str:
    step = numbers[1] - numbers[0]
    is_regular = numbers == list(range(numbers[0], numbers[-1] + 1, step))
    if is_regular and not stem:
        return f"[{numbers[0]}:{numbers[-1] + 1}{f':{step}' if step > 1 else ''}]"
    if is_regular and step == 1:
        return f"{stem}{{{numbers[0]}..{numbers[-1]}}}"
    return f"{stem}{{{', '.join(map(str, numbers[:3]))}{', ...' if len(numbers) > 3 else ''}}}"


def _merged(run: list[_Branch], label: str) -> _Branch:
    below = zip(*(branch.children for branch in run), strict=True)
    return _Branch(
        label=label,
        row=replace(run[0].row, parameters=_parameters(run)),
        children=[_merged(list(alike), alike[0].label) for alike in below],
        layers=sum(branch.layers for branch in run),
        copies=sum(branch.copies for branch in run),
    )


def _absorb_alike(root: _Branch) -> _Branch:
    """A layer that gets, all the way down, what the layer around it gets by the same rule is shown with it."""
    children = [_absorb_alike(child) for child in root.children]
    whole = [root, *(child for child in children if _is_alike(child, root))]
    row = replace(root.row, parameters=_parameters(whole), is_tied=any(branch.row.is_tied for branch in whole))
    kept = [child for child in children if not _is_alike(child, root)]
    return replace(root, row=row, layers=sum(branch.layers for branch in whole), children=kept)


def _is_alike(child: _Branch, around: _Branch) -> bool:
    return not child.children and child.key == around.key


def _parameters(branches: Sequence[_Branch]) -> int | None:
    """The number of parameters of all; None if some are not initialised yet."""
    known = [branch.row.parameters for branch in branches if branch.row.parameters is not None]
    return sum(known) if len(known) == len(branches) else None


def _prune(root: _Branch, limit: int) -> _Branch:
    """Cut off the deepest rows until the rest fits, summing up what is cut; long rows of siblings are cut short."""
    depth = 1
    while (deeper := _size_to(root, depth + 1)) <= limit and deeper > _size_to(root, depth):
        depth += 1
    return _cut(root, depth) if _size(root) > limit else root


def _size_to(branch: _Branch, depth: int) -> int:
    return 1 + sum(_size_to(child, depth - 1) for child in branch.children[:_MAX_SIBLINGS]) if depth else 1


def _cut(branch: _Branch, depth: int) -> _Branch:
    if not branch.children:
        return branch
    if depth == 0:
        return _summary(branch.label, [branch])
    children = [_cut(child, depth - 1) for child in branch.children[:_MAX_SIBLINGS]]
    if rest := branch.children[_MAX_SIBLINGS:]:
        children[-1:] = [_summary(f"* ({len(rest) + 1} more)", branch.children[_MAX_SIBLINGS - 1 :])]
    return replace(branch, children=children)


def _summary(label: str, branches: list[_Branch]) -> _Branch:
    below = [branch for top in branches for branch in _walk(top)]
    rules = {branch.row.rule for branch in below}
    layers = Counter[str]()
    for branch in below:
        layers[branch.row.formats] += branch.layers
    formats = [f"{formats} x {count}" for formats, count in layers.most_common(3)] + ["..."] * (len(layers) > 3)
    row = Row(
        name="",
        type_name=branches[0].row.type_name if len(branches) == 1 else "several",
        parameters=_parameters(below),
        is_tied=any(branch.row.is_tied for branch in below),
        formats=", ".join(formats) if len(layers) > 1 else next(iter(layers)),
        rule=rules.pop() if len(rules) == 1 else f"{len(rules)} rules",
    )
    return _Branch(label, row, layers=layers.total(), copies=branches[0].copies if len(branches) == 1 else 1)


def _rows(branch: _Branch, prefix: str) -> Iterator[Row]:
    name = f"{prefix}.{branch.label}" if prefix else branch.label
    type_name = branch.row.type_name
    type_name += f" x {branch.copies}" if branch.copies > 1 else ""
    type_name += f" ({branch.layers} layers)" if branch.layers > branch.copies else ""
    yield replace(branch.row, name=name or '""', type_name=type_name)
    for child in branch.children:
        yield from _rows(child, name)
