"""The console script ``mixprec``: what can be asked without a training.

Exit status: 0; 1 for a finding (of ``check`` and ``doctor``); 2 for wrong use, of which one line says what is right.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning_mixprec.cli import checking, doctor, format_table
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.report import __main__ as report

FINDING, WRONG_USE = 1, 2


def main(args: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; returns the exit status."""
    options = parser().parse_args(args)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (MixPrecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; ``run`` of what it parses is the function to call."""
    parser = argparse.ArgumentParser(prog="mixprec", description="Ask about number formats, policies, runs, devices.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = _command(commands, "check", _check, "say what is wrong with a policy: by itself, on a device, on a model")
    check.add_argument("policy", metavar="POLICY", help="a YAML file, or the name of a format")
    check.add_argument("--device", metavar="NAME", help='a GPU by name, such as "t4", or "cpu" for this machine\'s')
    check.add_argument(
        "--model", metavar="MODULE:CLASS", help="a class, or a function that returns a model, called without arguments"
    )
    _command(commands, "doctor", _doctor, "print versions, devices and extras, to be pasted into a bug report")
    reports = _command(commands, "report", _report, "make the HTML report of a run, or of two side by side")
    reports.add_argument("runs", nargs="+", metavar="RUN", help="log directory of a run, as lightning_logs/version_0")
    reports.add_argument("--output", metavar="FILE", help="the HTML file (default: in the first RUN)")
    _command(commands, "formats", _formats, "print the table of number formats")
    if importlib.util.find_spec("shtab") is not None:
        import shtab

        shtab.add_argument_to(parser, "--print-completion", help="print a script for the shell's completion")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], does: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
    command.set_defaults(run=run)
    return command


def _check(options: argparse.Namespace) -> int:
    told = checking.check(options.policy, options.device, options.model)
    print("\n".join([*told.lines, *(f"finding: {each}" for each in told.findings)]))
    return FINDING if told.findings else 0


def _doctor(options: argparse.Namespace) -> int:
    lines, findings = doctor.examine()
    print("\n".join([*lines, *(f"finding: {each}" for each in findings)]))
    return FINDING if findings else 0


def _report(options: argparse.Namespace) -> int:
    output = [] if options.output is None else ["--output", options.output]
    return WRONG_USE if report.main([*options.runs, *output]) else 0


def _formats(options: argparse.Namespace) -> int:
    print("\n".join(format_table.lines()))
    return 0
