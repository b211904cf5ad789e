"""A rule: the layers that it selects, and the formats that they get."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import (
    FORMATS,
    compute_formats,
    get_format,
    meant_by,
    param_formats,
    region_formats,
)
from lightning_mixprec.numerics.scaled import SCALINGS
from lightning_mixprec.policy.patterns import check_type_pattern, parse

_SHORT = {"p": "param", "c": "compute", "o": "output", "s": "scaling", "g": "gradients"}
_CHOICES = {"scaling": SCALINGS, "gradients": ("all", "input", "none")}


class FieldError(PolicyError):
    """A part of a policy is malformed; ``path`` leads to it from the top, so that files can say where."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the path, for errors that cross processes."""
        return type(self), (str(self), *self.path)


@dataclass(frozen=True)
class Rule:
    """Selects layers, by name, by type or by both, and says what they get.

    A rule covers the layers it matches and everything below them; what it does not say stays as it is: weights as the
    model stores them, the policy's default to compute in, the output as computed.

    Args:
        layers: A pattern for names as in ``named_modules()`` of the LightningModule, or a list of patterns: dotted
            names (``model.head``) whose segments may be globs (``encoder.*.attn``), ``**`` for any number of segments,
            or slices of numbered blocks (``blocks.[0:4]``); or ``re:`` and a regular expression for the whole name.
            ``""`` is the LightningModule itself.
        types: A class name, or a list of them: ``LayerNorm``, ``torch.nn.LayerNorm``, ``"*Norm*"``; subclasses
            included. With both, one layer must match both.
        param: The format the weights are stored in: fp64, fp32, bf16 or fp16. What 16 bits lose of a weight is kept by
            the optimizers of ``lightning_mixprec.optim``, and by no other.
        compute: The format that the layers' own operations are autocast to: fp64, fp32, bf16 or fp16. Or fp8 or int8,
            for the products of ``nn.Linear`` and its subclasses; the other layers that the rule covers compute in the
            16-bit format around them, or else in bf16, and so does everything in a Linear but its products.
        output: The format in which the matched layers hand their output on: fp64, fp32, bf16, fp16, or ``"input"`` for
            the one that came in. Layers inside them hand on as computed.
        recurse: Whether the layers below are covered too, and not only the matched layers' own operations.
        scaling: For fp8: what one scale is of, a whole ``"tensor"`` (the default) or each ``"row"`` of it, which loses
            less and takes more time. int8 is scaled by row.
        gradients: For fp8 and int8: which gradients of a layer are products in 8 bits as well: ``"all"`` (the default
            of fp8), that of the ``"input"`` alone, or ``"none"`` (the default of int8). Others are products in 16 bits.

    Raises:
        PolicyError: An argument is malformed, nothing is selected, or nothing is said.

    >>> Rule(types="*Norm*", compute="fp32", output="input").to_dict()
    {'types': '*Norm*', 'compute': 'fp32', 'output': 'input'}
    """

    layers: str | list[str] | tuple[str, ...] | None = None
    types: str | list[str] | tuple[str, ...] | None = None
    param: str | None = None
    compute: str | None = None
    output: str | None = None
    recurse: bool = True
    scaling: str | None = None
    gradients: str | None = None
    origin: str | None = field(default=None, init=False, repr=False, compare=False)
    """The file and line it was read from."""

    def __post_init__(self) -> None:
        """Check every argument; lists become tuples, so that a rule is hashable and cannot change."""
        for name in ("layers", "types"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))
            _check_names(name, getattr(self, name))
        for name in ("param", "compute", "output"):
            if getattr(self, name) is not None:
                check_format(name, getattr(self, name))
        for name in _CHOICES:
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), self.compute)
        if not isinstance(self.recurse, bool):
            raise FieldError(f"recurse is {self.recurse!r}; it must be true or false", "recurse")
        if self.layers is None and self.types is None:
            raise FieldError("a rule selects no layers; give layers, types or both")
        if not self.said:
            raise FieldError("a rule must say at least one of param, compute and output")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns for names."""
        return _as_tuple(self.layers)

    @property
    def type_patterns(self) -> tuple[str, ...]:
        """The patterns for types."""
        return _as_tuple(self.types)

    @property
    def said(self) -> dict[str, str]:
        """What it gives, by param, compute, output, scaling and gradients."""
        given = {name: getattr(self, name) for name in _SHORT.values()}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def label(self) -> str:
        """Its selection of layers, in a few words.

        >>> Rule("model.head", types=["Linear", "Conv2d"], compute="fp32").label
        'model.head, types Linear|Conv2d'
        """
        patterns = [pattern or '""' for pattern in self.patterns]
        parts = [" | ".join(patterns)] if patterns else []
        parts += [f"types {'|'.join(self.type_patterns)}"] if self.type_patterns else []
        return ", ".join(parts) + ("" if self.recurse else ", recurse=False")

    @property
    def value(self) -> str:
        """What it gives, in the short form of a mapping.

        >>> Rule("model.head", compute="fp32", output="input").value
        'c=fp32,o=input'
        """
        return short_form(self.said)

    def to_dict(self) -> dict[str, Any]:
        """Its arguments as plain types, without those at their defaults."""
        result: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.init and value != entry.default:
                result[entry.name] = list(value) if isinstance(value, tuple) else value
        return result

    @property
    def place(self) -> str:
        """The beginning of an error about it: the file and line it was read from, if it was."""
        return f"{self.origin}: " if self.origin else ""

    def read_from(self, origin: str) -> "Rule":
        """The same rule, knowing the file and line it was read from."""
        copy = Rule(**self.to_dict())
        object.__setattr__(copy, "origin", origin)
        return copy


RULE_KEYS = tuple(entry.name for entry in fields(Rule) if entry.init and entry.default is not MISSING)


def check_format(name: str, value: object) -> None:
    """Check the format that is given for ``param``, ``compute``, ``output`` or a policy's ``default``.

    Raises:
        FieldError: there is no such format, or not for that.
    """
    allowed = {"param": param_formats, "compute": compute_formats}.get(name, region_formats)()
    allowed = (*allowed, "input") if name == "output" else allowed
    if isinstance(value, str) and value in allowed:
        return
    options = f"{name} takes {', '.join(allowed)}"
    meant = meant_by(value)
    hint = f", did you mean {meant!r}?" if meant in allowed else did_you_mean(str(value), allowed)
    if not isinstance(value, str):
        raise FieldError(f"{name} is {value!r} ({type(value).__name__}){hint} {options}", name)
    if value == "input":
        raise FieldError(f"{name} is 'input', which only output can be; {options}", name)
    if value not in FORMATS:
        raise FieldError(f"{name}: unknown format {value!r}{hint} {options}", name)
    if name == "param":
        raise FieldError(f"param is {value!r}, but weights are not stored in 8 bits; {options}", name)
    if value in compute_formats():
        raise FieldError(
            f"{name} is {value!r}, in which products of Linear layers compute and nothing else; {options}, and a rule "
            f"may say compute: {value}",
            name,
        )
    raise FieldError(f"{name} is {value!r}, which is not computed in yet; {options}", name)


def is_of_products(compute: str | None) -> bool:
    """True of a format that products alone compute in.

    >>> is_of_products("fp8"), is_of_products("bf16"), is_of_products(None)
    (True, False, False)
    """
    return compute is not None and get_format(compute).use.products != ""


def _check_choice(name: str, value: object, compute: str | None) -> None:
    options = f"{name} takes {' or '.join(_CHOICES[name])}"
    if value not in _CHOICES[name]:
        raise FieldError(f"{name} is {value!r}; {options}", name)
    if not is_of_products(compute):
        said = "does not say compute" if compute is None else f"says compute: {compute}"
        raise FieldError(f"{name} is said of compute: fp8 and int8, but the rule {said}; leave {name} out", name)
    if name == "scaling" and value == "tensor" and get_format(str(compute)).is_integer:
        raise FieldError(f"scaling is 'tensor', but {compute} is scaled by row; leave scaling out", name)


def parse_short_form(text: object) -> dict[str, Any]:
    """Reads the short form of a mapping: a compute format, or ``p=``, ``c=`` and ``o=`` with commas between.

    With fp8 or int8 there may be ``s=`` and ``g=``, for scaling and gradients.

    Raises:
        FieldError: it is neither.

    >>> parse_short_form("fp32"), parse_short_form("c=fp32,o=input")
    ({'compute': 'fp32'}, {'compute': 'fp32', 'output': 'input'})
    """
    if not isinstance(text, str):
        raise FieldError(
            f"the value is {text!r} ({type(text).__name__}); write a compute format such as fp32, or "
            "p=fp32,c=fp16,o=input"
        )
    if "=" not in text and "," not in text:
        check_format("compute", text)
        return {"compute": text}
    said: dict[str, str] = {}
    for piece in text.split(","):
        key, equals, format = (part.strip() for part in piece.partition("="))
        if not equals or key not in _SHORT or not format:
            raise FieldError(f"cannot read {piece.strip()!r} in {text!r}; write p=, c= or o= and a format each")
        if _SHORT[key] in said:
            raise FieldError(f"{text!r} says {key}= twice; leave one out")
        if _SHORT[key] not in _CHOICES:
            check_format(_SHORT[key], format)
        said[_SHORT[key]] = format
    for name in said.keys() & _CHOICES.keys():
        _check_choice(name, said[name], said.get("compute"))
    return said


def short_form(said: Mapping[str, str]) -> str:
    """Writes the short form of a mapping.

    >>> short_form({"compute": "fp32", "output": "input"})
    'c=fp32,o=input'
    """
    return ",".join(f"{name[0]}={format}" for name, format in said.items())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The middle of an error that names the word that was probably meant; a semicolon if none is near.

    >>> did_you_mean("computes", ["param", "compute"]), did_you_mean("color", ["param"])
    (', did you mean compute?', ';')
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ";"


def check_keys(given: Iterable[object], known: Sequence[str], where: str) -> None:
    """Check that a mapping has known keys alone.

    Raises:
        FieldError: it has another one.
    """
    for key in given:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise FieldError(f"unknown key {key!r} in {where}{near} the keys are {', '.join(known)}", str(key))


def _as_tuple(given: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def _check_names(name: str, given: object) -> None:
    if given is None:
        return
    entries = (given,) if isinstance(given, str) else given
    if not isinstance(entries, tuple):
        raise FieldError(f"{name} is {given!r} ({type(given).__name__}); write a string or a list of strings", name)
    if not entries:
        raise FieldError(f"{name} is an empty list; name at least one, or leave {name} out", name)
    check = parse if name == "layers" else check_type_pattern
    for place, entry in enumerate(entries):
        path = (name,) if isinstance(given, str) else (name, place)
        if not isinstance(entry, str):
            shown = entry.__name__ if isinstance(entry, type) else repr(entry)
            raise FieldError(f"{name} has {shown} ({type(entry).__name__}); write a string, in quotes", *path)
        try:
            check(entry)
        except PolicyError as error:
            raise FieldError(str(error), *path) from None
