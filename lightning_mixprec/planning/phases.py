"""The phases of a schedule: policies that come into force at given moments of a run."""

import contextlib
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, TypeGuard

from lightning_mixprec.errors import MixPrecError, PolicyError
from lightning_mixprec.policy.amending import read_edit
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy
from lightning_mixprec.policy.rules import check_keys, did_you_mean

CONFIGURED = "configured"
"""The word for the policy that the plugin was given."""

_PHASE_KEYS = ("at", "policy", "edit")
_EVENT_KEYS = {"plateau": ("event", "monitor", "mode", "patience", "min_delta"), "lr_below": ("event", "share")}
_AT_KEYS = ("step", "epoch", "event")
_FORMS = (
    "write a number of optimizer steps, a share of training such as '80%', {'step': 100}, {'epoch': 3}, "
    "{'event': 'plateau', 'monitor': 'val_loss'} or {'event': 'lr_below', 'share': 0.1}"
)


@dataclass(frozen=True)
class Now:
    """The position of a run before a step.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epochs completed.
        share: Share of the training that is done; 0 where training has no end.
        rate: The learning rate.
        peak: Its largest value so far.
    """

    step: int
    epoch: int
    share: Fraction = Fraction(0)
    rate: float = 0.0
    peak: float = 0.0


@dataclass(frozen=True)
class Moment:
    """A moment that is known beforehand: so many steps, so many epochs, or such a share of training.

    >>> str(Moment("share", Fraction("0.8")))
    '80% of training'
    """

    kind: Literal["step", "epoch", "share"]
    value: int | Fraction

    def __str__(self) -> str:
        return f"{_percent(self.value)} of training" if self.kind == "share" else f"{self.kind} {self.value}"

    def to_plain(self) -> Any:
        """As a user writes it."""
        return _percent(self.value) if self.kind == "share" else {self.kind: self.value}


@dataclass(frozen=True)
class Plateau:
    """The moment when a metric has not improved by more than ``min_delta`` for ``patience`` looks at it.

    >>> Plateau("val_loss").improves(0.5, best=0.6), Plateau("val_loss").improves(math.nan, best=None)
    (True, False)
    """

    monitor: str
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0

    def __str__(self) -> str:
        return f"plateau of {self.monitor}"

    def to_plain(self) -> Any:
        """As a user writes it."""
        return {"event": "plateau", **asdict(self)}

    def improves(self, value: float, best: float | None) -> bool:
        """True if a value is better than the best so far."""
        if best is None:
            return not math.isnan(value)
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


@dataclass(frozen=True)
class LowRate:
    """The moment when the learning rate has fallen below a share of its largest value so far."""

    share: float

    def __str__(self) -> str:
        return f"learning rate below {self.share:.4g} of its peak"

    def to_plain(self) -> Any:
        """As a user writes it."""
        return {"event": "lr_below", "share": self.share}


When = Moment | Plateau | LowRate


@dataclass(frozen=True)
class Phase:
    """A policy, or an edit of the one in force, that comes into force at a moment.

    Attributes:
        number: Its place in the schedule, from 1.
        when: Its moment.
        policy: The policy, or ``"configured"``; None if the phase is an edit.
        edit: From pattern to format.
    """

    number: int
    when: When
    policy: PrecisionPolicy | Literal["configured"] | None = None
    edit: Mapping[str, Any] | None = None

    def to_plain(self) -> dict[str, Any]:
        """As a user writes it, in plain types."""
        if self.edit is not None:
            return {"at": self.when.to_plain(), "edit": dict(self.edit)}
        policy = self.policy.to_dict() if isinstance(self.policy, PrecisionPolicy) else self.policy
        return {"at": self.when.to_plain(), "policy": policy}

    def is_due(self, now: Now, looks: int = 0) -> bool:
        """True if it is to come into force.

        Args:
            now: The position of the run.
            looks: The number of looks for which its metric has not improved.
        """
        if isinstance(self.when, Plateau):
            return looks >= self.when.patience
        if isinstance(self.when, LowRate):
            return now.rate < self.when.share * now.peak
        reached: int | Fraction = getattr(now, self.when.kind)
        return reached >= self.when.value


def read_phases(given: object) -> tuple[Phase, ...]:
    """Reads a schedule.

    Raises:
        PolicyError: It is malformed; one line that says which phase.

    >>> [phase] = read_phases([{"at": "80%", "edit": {"model.head": "fp32"}}])
    >>> str(phase.when), phase.edit
    ('80% of training', {'model.head': 'fp32'})
    """
    if not isinstance(given, list | tuple):
        raise PolicyError(f"phases is {given!r}; write a list of phases: [{{'at': '80%', 'policy': 'bf16'}}]")
    if not given:
        raise PolicyError("phases is an empty list; write at least one phase: [{'at': '80%', 'policy': 'bf16'}]")
    phases: list[Phase] = []
    for number, each in enumerate(given, start=1):
        with naming(number):
            phase = _phase(number, each)
            _check_order(phases, phase)
        phases.append(phase)
    return tuple(phases)


@contextlib.contextmanager
def naming(number: int) -> Generator[None, None, None]:
    """Names the phase in errors that are raised within."""
    try:
        yield
    except MixPrecError as error:
        raise type(error)(f"phase {number}: {error}") from None


def _phase(number: int, given: object) -> Phase:
    if not isinstance(given, Mapping):
        raise PolicyError(f"a phase is {given!r}; write a mapping such as {{'at': '80%', 'policy': 'bf16'}}")
    check_keys(given, _PHASE_KEYS, "a phase")
    if "at" not in given:
        raise PolicyError(f"it does not say when it comes; add at: {_FORMS}")
    if ("policy" in given) == ("edit" in given):
        came = "both policy and edit" if "edit" in given else "neither policy nor edit"
        raise PolicyError(f"it has {came}; give policy to replace the policy in force, or edit to amend it")
    when = _when(given["at"])
    if "edit" in given:
        return Phase(number, when, edit=_edit(given["edit"]))
    return Phase(number, when, policy=_policy(given["policy"]))


def _policy(given: object) -> PrecisionPolicy | Literal["configured"]:
    if given == "auto":
        raise PolicyError(
            "policy is 'auto', which chooses once, at the start; write a format, or 'configured' to go back to the "
            "policy that PerLayerPrecision was given"
        )
    return "configured" if given == CONFIGURED else as_policy(given)


def _edit(given: object) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or not given:
        raise PolicyError(f"edit is {given!r}; write a mapping from pattern to format: {{'model.head': 'fp32'}}")
    for pattern, value in given.items():
        read_edit(pattern, value)
    return {pattern: dict(value) if isinstance(value, Mapping) else value for pattern, value in given.items()}


def _when(at: object) -> When:
    if isinstance(at, int) and not isinstance(at, bool):
        return Moment("step", _count("at", at, least=0))
    if isinstance(at, str):
        return _share(at)
    if not isinstance(at, Mapping):
        hint = f", did you mean '{at * 100:g}%'?" if isinstance(at, float) and 0 < at < 1 else ";"
        raise PolicyError(f"at is {at!r} ({type(at).__name__}){hint} {_FORMS}")
    if "event" in at:
        return _event(at)
    check_keys(at, _AT_KEYS, "at")
    if len(at) != 1:
        raise PolicyError(f"at is {dict(at)!r}, which names {len(at)} moments; {_FORMS}")
    [(kind, value)] = at.items()
    return Moment(kind, _count(f"at {kind}", value, least=0))


def _share(text: str) -> Moment:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if found is None:
        near = did_you_mean(text, _EVENT_KEYS)
        raise PolicyError(f"at is {text!r}{near} {_FORMS}")
    share = Fraction(found[1]) / 100
    if share >= 1:
        raise PolicyError(f"at is {text!r}, when training is over; write a share from 0% to below 100%")
    return Moment("share", share) if share else Moment("step", 0)


def _event(at: Mapping[str, Any]) -> When:
    event = at["event"]
    if not isinstance(event, str) or event not in _EVENT_KEYS:
        near = did_you_mean(str(event), _EVENT_KEYS)
        raise PolicyError(f"event is {event!r}{near} the events are {', '.join(_EVENT_KEYS)}")
    check_keys(at, _EVENT_KEYS[event], f"event {event}")
    if event == "lr_below":
        share = at.get("share")
        if not _is_number(share) or not 0 < share <= 1:
            raise PolicyError(f"share is {share!r}; write a number above 0 and up to 1: the share of the peak")
        return LowRate(float(share))
    monitor, mode, min_delta = at.get("monitor"), at.get("mode", "min"), at.get("min_delta", 0.0)
    if not isinstance(monitor, str) or not monitor:
        raise PolicyError(f"monitor is {monitor!r}; write the name of a logged metric, such as 'val_loss'")
    if mode not in ("min", "max"):
        raise PolicyError(f"mode is {mode!r}; write 'min' if less is better, or 'max'")
    if not _is_number(min_delta) or not 0 <= min_delta < math.inf:
        raise PolicyError(f"min_delta is {min_delta!r}; write a number from 0 on")
    return Plateau(monitor, mode, _count("patience", at.get("patience", 3), least=1), float(min_delta))


def _check_order(earlier: Sequence[Phase], phase: Phase) -> None:
    """An edit builds on what came before it, so a schedule has to read in the order in which it happens."""
    when = phase.when
    for other in earlier:
        if not isinstance(other.when, Moment) or not isinstance(when, Moment):
            continue
        if (when.kind == other.when.kind or when.value == 0) and when.value < other.when.value:
            raise PolicyError(
                f"it comes at {when}, before phase {other.number} at {other.when}; list the phases in the order of time"
            )


def _count(name: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PolicyError(f"{name} is {value!r}; write a whole number from {least} on")
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _percent(share: int | Fraction) -> str:
    return f"{float(share * 100):g}%"
