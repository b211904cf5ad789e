"""The file of a plan: its content, checked when it is read, and what was measured of a plan's policy."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from typing_extensions import TypedDict

from lightning_mixprec.errors import PlanError
from lightning_mixprec.policy.rule_folding import LayerOutline
from lightning_mixprec.records.atomic_files import path_of, write_text
from lightning_mixprec.records.schema import Named, matches

_KIND: Literal["mixprec-plan"] = "mixprec-plan"
_VERSION: Literal["1"] = "1"


@dataclass(frozen=True, eq=False)
class Measured(Named):
    """What a plan's policy did when it was run on the batches; numbers are attributes and by name.

    Attributes:
        loss_gap: The root over batches of the mean of ``(L - L_fp32)**2``.
        grad_cosine: The smallest over batches of the cosine between the gradient of all weights and fp32's; NaN where
            one is nothing or not finite.
        seconds: The time of a step, on the device at hand; None if the plan is for another one.
        reference_seconds: The same in the reference.
        rounding: What the loss gap of fp32 with itself comes to if all is rounded otherwise; a gap as small
            means nothing.
    """

    loss_gap: float
    grad_cosine: float
    seconds: float | None = None
    reference_seconds: float | None = None
    rounding: float = 0.0

    def __eq__(self, other: object) -> bool:
        """True if all is the same; NaN is the same as NaN."""
        return isinstance(other, Measured) and repr(self) == repr(other)

    def __hash__(self) -> int:
        """Goes with equality."""
        return hash(repr(self))


class WrittenPlan(TypedDict):
    """The content of a file."""

    kind: Literal["mixprec-plan"]
    version: Literal["1"]
    model: str
    outline: list[LayerOutline]
    formats: list[str]
    budget: dict[str, float] | None
    chosen: list[str]
    how: str
    policy: dict[str, Any]
    measured: Measured | None
    sensitivities: dict[str, Any]
    costs: dict[str, Any]


def write_plan(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Writes a plan's content, all or nothing: YAML where the file's name ends so, else JSON.

    Raises:
        PlanError: There is no such place to write to.
    """
    content = {"kind": _KIND, "version": _VERSION, **data}
    is_yaml = path_of(path, "a plan").suffix in (".yaml", ".yml")
    text = yaml.safe_dump(content, sort_keys=False) if is_yaml else json.dumps(content, indent=1) + "\n"
    try:
        write_text(path, text)
    except OSError as error:
        told = f"{os.fspath(path)!r} cannot be written: {error.strerror or error}"
        raise PlanError(f"{told}; give the path of a file in a folder that can be written to") from error


def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads :func:`write_plan`.

    Raises:
        PlanError: The file cannot be read, or its content is not a plan's.
    """
    file = path_of(path, "a plan")
    name = os.fspath(path)
    try:
        text = file.read_text("utf-8")
        data = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise PlanError(f"cannot read {name}: {error.strerror}; give the path of a file that to_file wrote") from None
    except (ValueError, yaml.YAMLError) as error:
        raise PlanError(f"{name} is no plan: {' '.join(str(error).split())}; give a file that to_file wrote") from None
    if not matches(data, WrittenPlan):
        version = data.get("version") if isinstance(data, dict) and data.get("kind") == _KIND else None
        problem = (
            f"has the version {version!r}, and this reads {_VERSION!r}"
            if version not in (None, _VERSION)
            else ("holds no plan")
        )
        raise PlanError(f"{name} {problem}; give a file that PrecisionPlan.to_file wrote")
    return dict(data)
