"""What is wrong with a policy: by itself, on a device, on a model. ``mixprec check`` prints it."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mixprec.errors import MixPrecError, PolicyError, one_line
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy


@dataclass
class Checked:
    """The answer of a check.

    Attributes:
        lines: What was looked at.
        findings: What is wrong, a line each; empty if nothing is.
    """

    lines: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def check(policy: str, device: str | None = None, model: str | None = None) -> Checked:
    """Looks at a policy.

    Args:
        policy: A YAML file, or the name of a format.
        device: A device of the table, or ``"cpu"``; None to look at no device. What it lacks is a finding, with what
            would replace it.
        model: ``"module:name"`` of a class or function that is called without arguments and gives a model; None for
            none.

    Raises:
        MixPrecError: There is no such file, device or model.
    """
    if policy.endswith((".yaml", ".yml", ".json")) and not Path(policy).expanduser().is_file():
        raise MixPrecError(f"there is no file {policy!r}; give the path of a policy, or the name of a format.")
    checked = Checked()
    try:
        read = as_policy(policy)
    except PolicyError as error:
        checked.findings.append(str(error))
        return checked
    checked.lines += [f"default {read.default}", *(f"{rule.label} -> {rule.value}" for rule in read.rules)]
    if device is not None:
        _on_device(read, device, checked)
    if model is not None:
        _on_model(read, model, checked)
    return checked


def _on_device(policy: PrecisionPolicy, device: str, checked: Checked) -> None:
    checked.findings += map(str, policy.for_device(device).replacements)


def _on_model(policy: PrecisionPolicy, model: str, checked: Checked) -> None:
    try:
        checked.lines += ["", *str(policy.resolve(_made(model))).splitlines()]
    except PolicyError as error:
        checked.findings.append(str(error))


def _made(model: str) -> nn.Module:
    """The model that a class or function gives."""
    module, separator, name = model.partition(":")
    if not (module and separator and name):
        raise MixPrecError(f"--model is {model!r}; write MODULE:CLASS, as in my_package.models:Net.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), name)
        made = make()
    except Exception as error:  # whatever the user's own code raises
        raise MixPrecError(f"--model {model} could not be made: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise MixPrecError(f"--model {model} gave a {type(made).__name__}; it has to be a torch.nn.Module.")
    return made
