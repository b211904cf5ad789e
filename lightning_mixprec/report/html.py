"""One self-contained HTML file from a report's content: it loads nothing, and is readable without its script."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.colors import COLORS, OTHER, tint
from lightning_mixprec.report import charts, view

TEMPLATES = Path(__file__).parent / "templates"


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
