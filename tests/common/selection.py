"""What a quick run takes of an exhaustive family, and what of it a test run is about to do."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but_for(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values of an exhaustive parametrization, of which the quick ones are run by plain ``pytest``."""
    return [value if value in quick else slow(value) for value in values]


def slow(*values: Any, **options: Any) -> Any:
    """One set of parameters that only ``pytest -m ""`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def selected(request: pytest.FixtureRequest, argument: str) -> set[Any]:
    """The values of an argument in those tests of a file that this run is about to do."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return {item.callspec.params[argument] for item in items if argument in item.callspec.params}
