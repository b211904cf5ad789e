"""Reports, written: an HTML file and a JSON file beside it with the same content."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mixprec.records.atomic_files import write_text
from lightning_mixprec.report.content import content_of
from lightning_mixprec.report.html import render
from lightning_mixprec.report.reading import read_records

_TOLD = 5


def write_report(folders: Sequence[str | Path], path: str | Path) -> tuple[Path, list[str]]:
    """Makes a report from what runs left in their log directories.

    Both files are complete or not there; what stood there before is replaced.

    Args:
        folders: The log directory of a run, or those of two.
        path: The HTML file; the JSON file has its name with ``.json``.

    Returns:
        The path, and the first alerts as lines.

    Raises:
        MixPrecError: A folder has no records.
        OSError: A file cannot be written.
    """
    path = Path(path)
    content = content_of([read_records(folder) for folder in folders])
    write_text(path.with_suffix(".json"), json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n")
    write_text(path, render(content))
    return path, _lines(content)


def _lines(content: dict[str, Any]) -> list[str]:
    alerts = [alert for run in content["runs"] for alert in run["alerts"] if alert["level"] != "note"]
    lines = [f"{alert['level']}: {alert['line']}" for alert in alerts]
    return [*lines[:_TOLD], *([f"... and {len(lines) - _TOLD} more"] if len(lines) > _TOLD else [])]
