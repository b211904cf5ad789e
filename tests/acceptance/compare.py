"""How two runs of Lightning's tests differ, by their junit files: ``python compare.py stock.xml ours.xml``."""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def outcomes(file: str | Path) -> dict[str, str]:
    """Test name to ``passed``, ``failed`` (errors included) or ``skipped`` (expected failures included)."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[name] = "failed" if "failed" in (outcome, found.get(name)) else outcome
    return found


def differences(stock: dict[str, str], ours: dict[str, str]) -> list[str]:
    """One line per test whose outcome is another one."""
    pairs = {name: (stock.get(name, "missing"), ours.get(name, "missing")) for name in sorted(stock.keys() | ours)}
    return [f"{before} -> {after}: {name}" for name, (before, after) in pairs.items() if before != after]


def _summary(found: dict[str, str]) -> str:
    counts = Counter(found.values())
    return " / ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    stock, ours = map(outcomes, sys.argv[1:])
    print(f"{_summary(stock)}  ->  {_summary(ours)}")
    print(*differences(stock, ours), sep="\n")
