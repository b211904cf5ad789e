"""State in a checkpoint that says its version, and is taken over whole or refused in one line."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.records.schema import Shapes, matches

_RELEASE = "this release of lightning_mixprec reads"


@dataclass(frozen=True)
class Layout:
    """The layout of somebody's state in a checkpoint: a mapping of plain values with ``version``.

    Args:
        owner: Whose it is.
        shapes: The shape of each part; a mapping of shapes for a part of which each part is checked by itself. A state
            may have more.
        instead: What to do rather than resume with a state of a later version.
        otherwise: The same rather than resume from another checkpoint.
        version: The version that is written.
        reads_earlier: Whether earlier versions are read, too.
    """

    owner: str
    shapes: Shapes
    instead: str
    otherwise: str
    version: int = 1
    reads_earlier: bool = False

    def check(
        self, state: object, contradictions: Callable[[Mapping[str, Any]], Iterable[str]] = lambda state: ()
    ) -> Mapping[str, Any]:
        """The state, if it can be gone on from.

        Args:
            state: What a checkpoint has.
            contradictions: Names the parts that have their shapes, but cannot be gone on from together.

        Raises:
            MixPrecError: It is of another version, not whole, or damaged.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        is_number = isinstance(version, int) and not isinstance(version, bool)
        if not isinstance(state, Mapping) or not is_number or not self._reads(version):
            which = f"up to {self.version}" if self.reads_earlier else f"version {self.version}"
            raise MixPrecError(
                f"The checkpoint's {self.owner} state has version {version!r}, {_RELEASE} {which}; "
                f"upgrade lightning_mixprec, or {self.instead}."
            )
        if missing := [*sorted(self.shapes.keys() - state.keys()), *self._missing_inside(state)]:
            raise MixPrecError(
                f"The checkpoint's {self.owner} state lacks {', '.join(missing)}; it was not written whole. Resume "
                f"from another checkpoint, or {self.otherwise}."
            )
        if damaged := list(self._damaged(state)) or list(contradictions(state)):
            raise MixPrecError(
                f"The checkpoint's {self.owner} state is damaged in {', '.join(damaged)}. Resume from another "
                f"checkpoint, or {self.otherwise}."
            )
        return state

    def _reads(self, version: Any) -> bool:
        return bool(version <= self.version if self.reads_earlier else version == self.version)

    def _missing_inside(self, state: Mapping[str, Any]) -> Iterator[str]:
        for name, shape in self.shapes.items():
            if isinstance(shape, Mapping) and name in state:
                inside = state[name]
                yield from (f"{name}.{key}" for key in shape if not isinstance(inside, Mapping) or key not in inside)

    def _damaged(self, state: Mapping[str, Any]) -> Iterator[str]:
        for name, shape in self.shapes.items():
            if isinstance(shape, Mapping):
                yield from (f"{name}.{key}" for key in shape if not matches(state[name][key], shape[key]))
            elif not matches(state[name], shape):
                yield name
