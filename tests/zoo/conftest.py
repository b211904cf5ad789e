"""The zoo's table: which network passed what, for ``MIXPREC_ZOO_TABLE=FILE pytest -n 0 -m zoo tests/zoo``."""

import os
from pathlib import Path

import pytest

_COLUMNS = {
    "test_uniform_bf16_is_lightnings_to_the_last_bit": "bf16",
    "test_a_part_in_fp32_inside_bf16_computes_as_if_written_so_by_hand": "a part in fp32",
    "test_monitors_change_no_bit_of_an_fp16_run_and_see_every_step": "fp16, watched",
    "test_compiled_it_computes_what_the_uncompiled_run_does": "compiled",
}
_OUTCOMES: dict[str, dict[str, str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and hasattr(item, "callspec"):
        told = {"passed": "yes", "failed": "**no**", "skipped": "-"}[report.outcome]
        _OUTCOMES.setdefault(item.callspec.params["name"], {})[item.originalname] = told
    return report


def pytest_sessionfinish():
    path = os.environ.get("MIXPREC_ZOO_TABLE")
    if path and _OUTCOMES:
        Path(path).write_text(table())


def table() -> str:
    """The outcomes as a table of Markdown."""
    lines = [f"| network | {' | '.join(_COLUMNS.values())} |", f"|---|{'---|' * len(_COLUMNS)}"]
    for name, told in _OUTCOMES.items():
        lines.append(f"| {name} | {' | '.join(told.get(column, '') for column in _COLUMNS)} |")
    return "\n".join(lines) + "\n"
