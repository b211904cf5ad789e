"""The guide's table of versions is what runs of the core tests recorded."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import version_table
from packaging.requirements import Requirement
from version_table import FILE, GUIDE, ROOT, SELECTION, merged, table, with_table


def test_the_guide_has_the_files_rows_and_all_of_them_passed():
    rows = json.loads(FILE.read_text())
    assert with_table(GUIDE.read_text(), rows) == GUIDE.read_text() and table(rows) in GUIDE.read_text()
    assert all(row["failed"] == 0 and row["passed"] > 100 for row in rows)


def test_the_rows_have_the_oldest_that_are_asked_for():
    import tomllib

    rows = json.loads(FILE.read_text())
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = {each.name: each.specifier for each in map(Requirement, asked)}
    for name in ("torch", "lightning"):
        found = {row[name] for row in rows}
        assert all(each in asked[name] for each in found)
        least = next(each.version for each in asked[name] if each.operator == ">=")
        assert any(each.startswith(least) for each in found), f"no run with {name} {least}"


def test_what_is_selected_is_there():
    assert all((ROOT / each).exists() for each in SELECTION)


def test_a_run_is_recorded_and_takes_the_place_of_an_older_one(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_a(): pass\n\n@pytest.mark.skip\ndef test_b(): pass\n"
    )
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/common")))
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")],
        env=os.environ | {"MIXPREC_RECORD": str(path), "PYTHONPATH": paths},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(path.read_text())
    assert (told["passed"], told["skipped"], told["failed"]) == (1, 1, 0)
    assert (told["torch"], told["lightning"]) == (version("torch"), version("lightning"))
    older = told | {"torch": "2.9.1", "day": "2026-01-01"}
    rows = merged([older, told | {"passed": 0, "day": "2026-01-02"}], [told | {"day": "2026-01-03"}])
    assert [(row["torch"], row["passed"], row["day"]) for row in rows] == [
        (told["torch"], 1, "2026-01-03"),
        ("2.9.1", 1, "2026-01-01"),
    ]


@pytest.mark.parametrize("page", ["", "before\n<!-- from versions.json -->\nold\n<!-- end -->\nafter\n"])
def test_a_table_is_put_between_its_marks(page):
    rows = [dict.fromkeys(version_table._COLUMNS, "x")]
    made = with_table(page, rows)
    assert "old" not in made and made.count(table(rows)) == 1 and with_table(made, rows) == made
    assert not page or (made.startswith("before\n") and made.endswith("\nafter\n"))
