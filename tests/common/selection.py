"""What a quick run takes of an exhaustive family, and what of it a test run is about to do."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def slow_but_for(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values of an exhaustive parametrization, of which the quick ones are run by plain ``pytest``."""
    return [value if value in quick else slow(value) for value in values]


def slow_cases_but_for(quick: Collection[str], cases: Mapping[str, Any]) -> list[Any]:
    """The same of cases that have names, each with the values of all arguments or of the only one."""
    marks = {name: () if name in quick else (pytest.mark.slow,) for name in cases}
    each = {name: values if isinstance(values, tuple) else (values,) for name, values in cases.items()}
    return [pytest.param(*values, id=name, marks=marks[name]) for name, values in each.items()]


def slow(*values: Any, **options: Any) -> Any:
    """One set of parameters that only ``pytest -m ""`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def selected(request: pytest.FixtureRequest, argument: str) -> set[Any]:
    """The values of an argument in those tests of a file that this run is about to do."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return {item.callspec.params[argument] for item in items if argument in item.callspec.params}
