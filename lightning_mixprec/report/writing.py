"""Reports, written: an HTML file that loads nothing and is readable without its script, and its content as JSON."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.plots import COLORS, OTHER, tint
from lightning_mixprec.records.atomic_files import write_text
from lightning_mixprec.report import charts, view
from lightning_mixprec.report.content import content_of
from lightning_mixprec.report.reading import read_records

TEMPLATES = Path(__file__).parent / "templates"
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


def render(content: dict[str, Any]) -> str:
    """The report as one HTML file.

    Args:
        content: The content of a report with one run, or with two that are shown side by side.

    Raises:
        SupportError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise SupportError("a report needs jinja2; install it with pip install 'lightning_mixprec[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=charts.percent, formatclass=view.format_class)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "report.js"))
    style = _format_colors() + style
    page = environment.get_template("page.html.j2").render(
        **view.view(content), style=style, script=script, style_hash=_hash(style), script_hash=_hash(script)
    )
    # A lone surrogate in a name has no UTF-8 form and would keep the file from being written.
    return page.encode("utf-8", "replace").decode("utf-8")


def _format_colors() -> str:
    """The variables of the style sheet with the formats' colours."""
    colors = {view.format_class(name): color for name, color in COLORS.items()} | {view.OTHER_CLASS: OTHER}
    return f":root {{ {' '.join(f'--{name}: {tint(color)};' for name, color in colors.items())} }}\n"


def _hash(text: str) -> str:
    """The name by which a Content-Security-Policy lets an inline text through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
