"""The policy: a default format and rules for the layers that get something else."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import region_formats
from lightning_mixprec.numerics.ranges import read_ranges
from lightning_mixprec.policy.amending import amended_rules
from lightning_mixprec.policy.assignment import Assignment
from lightning_mixprec.policy.idle_rules import check_rules
from lightning_mixprec.policy.moving import Replacement, moved, supports_of
from lightning_mixprec.policy.resolving import assignment_of, resolve
from lightning_mixprec.policy.rules import FieldError, Rule, check_format
from lightning_mixprec.policy.written import yaml_files as files
from lightning_mixprec.policy.written.written_forms import check_flag, read_mapping, read_rules


@dataclass(frozen=True)
class PrecisionPolicy:
    """A default format, and rules for the layers that get something else.

    The rule that matches the nearest enclosing layer, the layer itself first, decides alone; among rules that match
    that same layer the first in the list. So "encoder in bf16, its norms in fp32" works in either order.

    Args:
        default: The format to compute in where no rule says another: fp64, fp32, bf16 or fp16.
        rules: The rules.
        allow_unmatched: Whether a rule may match nothing in a model.

    Raises:
        PolicyError: An argument is malformed.

    >>> policy = PrecisionPolicy("bf16", [Rule("encoder", compute="fp16"), Rule(types="LayerNorm", compute="fp32")])
    >>> model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "head": nn.Linear(2, 2)})
    >>> {name: layer.compute for name, layer in policy.resolve(model).items() if name}
    {'encoder': 'fp16', 'encoder.0': 'fp16', 'encoder.1': 'fp32', 'head': 'bf16'}
    """

    default: str
    rules: Sequence[Rule] = ()
    allow_unmatched: bool = False
    replacements: tuple[Replacement, ...] = field(default=(), init=False, repr=False, compare=False)
    """What :meth:`for_device` replaced; empty for a policy that is as it was written."""

    def __post_init__(self) -> None:
        """Check every argument; rules may come as mappings and become a tuple of rules."""
        try:
            check_format("default", self.default)
            object.__setattr__(self, "rules", read_rules(self.rules))
            check_flag(self.allow_unmatched)
        except FieldError as error:
            raise PolicyError(_with_rule_number(error)) from None

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "PrecisionPolicy":
        """Read a policy in the full form (``default``, ``rules``) or the short one (``default``, pattern: format).

        Raises:
            PolicyError: it is malformed.

        >>> policy = PrecisionPolicy.from_dict({"default": "fp16", "model.head": "fp32", "**.norm": "c=fp32,o=input"})
        >>> [(rule.layers, rule.compute, rule.output) for rule in policy.rules]
        [('model.head', 'fp32', None), ('**.norm', 'fp32', 'input')]
        """
        try:
            parts = read_mapping(mapping)
        except FieldError as error:
            raise PolicyError(_with_rule_number(error)) from None
        return cls(parts.default, parts.rules, parts.allow_unmatched)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "PrecisionPolicy":
        """Read a policy from a YAML file in either form; its errors, later ones included, name file and line.

        Raises:
            PolicyError: the file cannot be read or is malformed.
        """
        document = files.read(path)
        try:
            parts = read_mapping(document.content)
        except FieldError as error:
            raise PolicyError(f"{document.where(error.path)}: {error}") from None
        rules = [rule.read_from(document.where(at)) for rule, at in zip(parts.rules, parts.paths, strict=True)]
        return cls(parts.default, rules, parts.allow_unmatched)

    def to_dict(self) -> dict[str, Any]:
        """The full form, of plain types; ``from_dict`` gives an equal policy.

        >>> PrecisionPolicy("bf16", [Rule("model.head", compute="fp32")]).to_dict()
        {'default': 'bf16', 'rules': [{'layers': 'model.head', 'compute': 'fp32'}]}
        """
        rest = {"allow_unmatched": True} if self.allow_unmatched else {}
        return {"default": self.default, "rules": [rule.to_dict() for rule in self.rules]} | rest

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a YAML file, all or nothing; ``from_file`` gives an equal policy."""
        files.write(path, self.to_dict())

    def resolve(self, model: nn.Module) -> Assignment:
        """Decide for every layer of a model; nothing of the model is changed or kept.

        Args:
            model: The LightningModule, or any module; wrappers such as DDP and ``torch.compile`` are looked through.

        Raises:
            PolicyError: A rule does nothing, or a shared layer or tied weight would get two formats.
        """
        resolution = resolve(self.default, self.rules, model)
        check_rules(resolution, self.allow_unmatched)
        return assignment_of(resolution)

    def amend(self, edits: Mapping[str, Any], model: nn.Module) -> "PrecisionPolicy":
        """This policy with some layers changed, as is allowed while a model is running: compute and output only.

        New rules go in front. A rule for the very same pattern gives way to the new one and lends it what the edit does
        not say; if the edit is for own operations alone, a recursive rule stays, for the layers below. Rules that have
        nothing left to decide are dropped, so the result resolves like any other policy.

        Args:
            edits: From pattern to a compute format, to ``"c=fp32,o=input"``, or to a mapping with compute, output and
                recurse.
            model: The model that the policy is in force on.

        Raises:
            PolicyError: An edit is malformed, matches nothing, or is about param.

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> PrecisionPolicy("bf16").amend({"1": "fp32"}, model).to_dict()
        {'default': 'bf16', 'rules': [{'layers': '1', 'compute': 'fp32'}]}
        """
        rules = amended_rules(self.default, self.rules, edits, model, self.allow_unmatched)
        return replace(self, rules=rules)

    def for_device(
        self, name: str, ranges: Mapping[str, float] | str | os.PathLike[str] | None = None
    ) -> "PrecisionPolicy":
        """This policy for a device: the formats that it has no arithmetic for are replaced.

        8 bits give way to bf16; bf16 to fp16 where that holds what was recorded, with a bit to spare, and to fp32
        elsewhere; fp16 to bf16, or to fp32 where there is none. Weights stay stored as they are. A layer that fp16
        does not hold gets a rule of its own, and so does the layer after it, which may take its output. ``compare``
        shows what became of the model.

        Args:
            name: A device of the table (``"t4"``, ``"V100 PCIe 32GB"``, ``"cpu"``), or ``"cuda:0"`` of this machine.
            ranges: The log directory of a run with ``UnderflowMonitor``, or by layer the largest magnitude that it
                hands on, in the model's order. A layer that is not in it goes with the others of its rule. None:
                nothing is known, and bf16 gives way to fp32.

        Returns:
            A policy, with ``replacements``: a :class:`Replacement` with ``where``, ``key``, ``old``, ``new`` and
            ``reason`` for each; empty if the device lacks nothing.

        Raises:
            SupportError: There is no such device.
            MixPrecError: ``ranges`` cannot be read.

        >>> policy = PrecisionPolicy("bf16").for_device("t4", ranges={"net.0": 12.0, "net.1": 1e6})
        >>> policy.to_dict()
        {'default': 'fp16', 'rules': [{'layers': 'net.1', 'compute': 'fp32'}]}
        >>> print(policy.replacements[1])
        'net.1': compute bf16 -> fp32 (T4 (compute capability 7.5) has no bf16 arithmetic, which came with 8.0; its ...
        """
        known = {} if ranges is None else read_ranges(ranges)
        default, rules, replacements = moved(self.default, self.rules, supports_of(name), known)
        new = replace(self, default=default, rules=rules)
        object.__setattr__(new, "replacements", tuple(replacements))
        return new


def as_policy(value: object) -> PrecisionPolicy:
    """The policy that a user means by a format name, a path to a YAML file, a mapping, or a policy itself.

    What has a policy (a plan, a plugin) stands for it.

    Raises:
        PolicyError: it is none of these.

    >>> as_policy("bf16")
    PrecisionPolicy(default='bf16', rules=(), allow_unmatched=False)
    """
    if isinstance(value, PrecisionPolicy):
        return value
    if isinstance(value, Mapping):
        return PrecisionPolicy.from_dict(value)
    if isinstance(value, os.PathLike):
        return PrecisionPolicy.from_file(value)
    if isinstance(own := getattr(value, "policy", None), PrecisionPolicy):
        return own
    if not isinstance(value, str):
        raise PolicyError(
            f"policy is {value!r} ({type(value).__name__}); give a format name, a path to a YAML file, a mapping or a "
            "PrecisionPolicy"
        )
    if value in region_formats():
        return PrecisionPolicy(value)
    if _is_path(value):
        return PrecisionPolicy.from_file(value)
    try:
        return PrecisionPolicy(value)
    except PolicyError as error:
        problem = str(error).replace("default", "policy", 1).replace("default takes", "policy takes")
        raise PolicyError(f"{problem}, or the path of a file; no file is called so") from None


def describe_difference(one: PrecisionPolicy, other: PrecisionPolicy) -> str:
    """The difference between a policy and another, in one line.

    >>> describe_difference(as_policy("fp16"), as_policy({"default": "bf16", "model.head": "fp32"}))
    'default fp16 -> bf16; model.head (c=fp32) added'
    """
    parts = [f"default {one.default} -> {other.default}"] if one.default != other.default else []
    if one.allow_unmatched != other.allow_unmatched:
        parts.append(f"allow_unmatched {one.allow_unmatched} -> {other.allow_unmatched}".lower())
    parts += _rule_differences(one.rules, other.rules)
    return "; ".join(parts) or "no difference"


def _is_path(text: str) -> bool:
    looks_like_one = text.endswith((".yaml", ".yml", ".json")) or "/" in text or os.sep in text
    try:
        return looks_like_one or Path(text).expanduser().is_file()
    except (OSError, ValueError):
        return False


def _rule_differences(one: Sequence[Rule], other: Sequence[Rule]) -> list[str]:
    removed = [rule for rule in one if rule not in other]
    added = [rule for rule in other if rule not in one]
    parts = []
    for rule in removed:
        successor = next((new for new in added if new.label == rule.label), None)
        if successor is None:
            parts.append(f"{rule.label} ({rule.value}) removed")
        else:
            added.remove(successor)
            parts.append(f"{rule.label} {rule.value} -> {successor.value}")
    parts += [f"{rule.label} ({rule.value}) added" for rule in added]
    common = [rule for rule in one if rule in other], [rule for rule in other if rule in one]
    if common[0] != common[1]:
        parts.append("rules in another order")
    return parts


def _with_rule_number(error: FieldError) -> str:
    match error.path:
        case ("rules", int(place), *_):
            return f"rule {place + 1}: {error}"
    return str(error)
