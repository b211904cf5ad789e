"""What the core tests ran with: recorded by a run of pytest, kept in a JSON file, shown as the table of a guide.

    MIXPREC_RECORD=record.json pytest -n logical $(python tests/common/version_table.py --selection)
    python tests/common/version_table.py record.json        # takes the record over into the file and the guide

``.ci/run`` does both with what it ran; ``tests/packaging/test_version_table.py`` holds the guide against the file.
"""

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples/guides/versions.json"
GUIDE = ROOT / "examples/guides/versions.md"

SELECTION = ["tests/deploy/test_prepared.py", "tests/deploy/test_compare.py", "tests/plugin/test_uniform.py"]
"""The core: what is trained, bit for bit as by stock Lightning, what is compared, and how runs are begun and ended."""

_COLUMNS = ("torch", "lightning", "name", "python", "passed", "skipped", "failed", "day")
_BEGIN, _END = "<!-- from versions.json -->", "<!-- end -->"


def record(path, counts):
    """Writes the versions that a run of pytest has had, and how many of its tests passed."""
    name = os.environ.get("MIXPREC_TEST_LIGHTNING", "lightning.pytorch")
    told = {
        "torch": version("torch"),
        "lightning": version("lightning" if name == "lightning.pytorch" else name),
        "name": name,
        "python": platform.python_version(),
        **{each: counts.get(each, 0) for each in ("passed", "skipped", "failed")},
    }
    told["failed"] += counts.get("error", 0)
    Path(path).write_text(json.dumps(told) + "\n")


def merged(rows, new):
    """Rows with new ones in the place of those of the same versions, the newest versions first."""
    found = {tuple(row[key] for key in _COLUMNS[:4]): row for row in [*rows, *new]}
    return [found[key] for key in sorted(found, key=_order, reverse=True)]


def _order(key):
    return [[int(part) if part.isdigit() else 0 for part in each.replace("+", ".").split(".")] for each in key[:2]], key


def table(rows):
    """The rows as Markdown."""
    lines = [" | ".join(["", *_COLUMNS, ""]).strip(), "|" + "---|" * len(_COLUMNS)]
    lines += [" | ".join(["", *(str(row[key]) for key in _COLUMNS), ""]).strip() for row in rows]
    return "\n".join(lines)


def with_table(page, rows):
    """A page with the table between its marks."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{table(rows)}\n\n{_END}{rest.partition(_END)[2]}"


def main(arguments):
    if arguments == ["--selection"]:
        print(*SELECTION)
        return
    today = datetime.date.today().isoformat()
    new = [json.loads(Path(each).read_text()) | {"day": today} for each in arguments]
    rows = merged(json.loads(FILE.read_text()) if FILE.exists() else [], new)
    FILE.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")
    GUIDE.write_text(with_table(GUIDE.read_text(), rows))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
