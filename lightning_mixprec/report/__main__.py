"""``python -m lightning_mixprec.report RUN_DIR [RUN_DIR]``: the report of a run, or of two side by side."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.report.writing import write_report


def main(args: Sequence[str] | None = None) -> int:
    """Makes a report as the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_mixprec.report",
        description="Make one HTML file of what precision did in a run, or in two runs side by side.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", help="log directory of a run, such as lightning_logs/version_0"
    )
    parser.add_argument(
        "--output", type=Path, help="the HTML file (default: precision_report.html in the first RUN_DIR)"
    )
    options = parser.parse_args(args)
    if len(options.runs) > 2:
        parser.error(f"{len(options.runs)} runs were given; give one, or two to compare")
    output = options.output or Path(options.runs[0]) / (
        "comparison.html" if options.runs[1:] else "precision_report.html"
    )
    if output.suffix != ".html":
        parser.error(f"--output is {str(output)!r}; it has to end in .html")
    try:
        path, alerts = write_report(options.runs, output)
    except (MixPrecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([str(path), *(f"  {alert}" for alert in alerts)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
