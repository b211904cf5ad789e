"""The plugin's part of a checkpoint: plain types, versioned, and what resuming it means."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any, Literal

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.assignment import Assignment, LayerPrecision
from lightning_mixprec.policy.policy import PrecisionPolicy, describe_difference
from lightning_mixprec.records.changes import Move
from lightning_mixprec.records.schema import Shapes, Tally, check_plain, is_plain
from lightning_mixprec.records.states import Layout

_VERSION = 1
_STOCK_STATES = ("MixedPrecision", "FSDPPrecision", "native_amp_scaling_state")


@dataclass(frozen=True)
class PluginState:
    """The plugin's part of a checkpoint.

    Args:
        configured: The policy as the user configured it, in mapping form, or ``"auto"``.
        policy: The policy in force, changes made during the run included.
        history: The changes.
        scaler: State of the loss scaler.
        steps: State of the ledger of skipped steps.
        version: Version of this layout.
    """

    configured: str | dict[str, Any]
    policy: dict[str, Any]
    history: list[Move]
    scaler: dict[str, Any]
    steps: dict[str, Any]
    version: int = _VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that a checkpoint loads with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], whole: Mapping[str, Any]) -> "PluginState":
        """Reads :meth:`to_dict`.

        Args:
            state: What was saved.
            whole: A state that lacks nothing, to compare with.

        Raises:
            MixPrecError: The state is of a later version, not whole, or damaged.
        """
        alone = "load the weights alone"
        shapes = {"configured": str | dict, "policy": Any, "history": list[Move], **_parts(whole)}
        layout = Layout("PerLayerPrecision", shapes, alone, alone, _VERSION, reads_earlier=True)
        checked = layout.check(state, lambda state: () if is_plain(state["history"]) else ("history",))
        return cls(**{field.name: checked[field.name] for field in fields(cls)})

    def policy_to_resume(
        self,
        configured: str | dict[str, Any],
        on_policy_change: Literal["raise", "accept", "checkpoint"],
    ) -> PrecisionPolicy | None:
        """The policy to go on with; None for the one configured now.

        Moves made during the run are no change of configuration: they are resumed. What ``"auto"`` chose is not, it is
        chosen anew for the present device.

        Raises:
            PolicyError: Another policy is configured now, and ``on_policy_change`` is ``"raise"``; or the checkpoint's
                is malformed.
        """
        try:
            in_force = PrecisionPolicy.from_dict(self.policy)
        except PolicyError as error:
            raise PolicyError(f"The checkpoint's policy cannot be read: {error}") from None
        if configured == self.configured:
            return None if configured == "auto" and not self.history else in_force
        if on_policy_change == "raise":
            raise PolicyError(
                f"The checkpoint was written under another policy than the one configured now: "
                f"{_difference(self.configured, configured)}. Configure the same policy, or set "
                "on_policy_change='accept' (go on with the one configured now) or 'checkpoint' (with the checkpoint's)."
            )
        return in_force if on_policy_change == "checkpoint" else None

    def resumed(
        self,
        policy: PrecisionPolicy,
        configured: str | dict[str, Any],
        on_policy_change: Literal["raise", "accept", "checkpoint"],
        model: nn.Module,
        step: int,
    ) -> tuple[PrecisionPolicy, str | dict[str, Any], list[Move]]:
        """The policy to go on with, the form that counts as configured, and the history. Nothing is changed by asking.

        Args:
            policy: The policy configured now, without moves that an earlier run made.
            configured: The same in mapping form, or ``"auto"``.
            on_policy_change: As in :class:`PerLayerPrecision`.
            model: The model.
            step: Optimizer steps taken so far.

        Raises:
            PolicyError: As :meth:`policy_to_resume`; or one of the two policies does not fit the model.
        """
        taken = self.policy_to_resume(configured, on_policy_change)
        if taken is not None:
            return taken, self.configured, list(self.history)
        if configured == self.configured:
            return policy, configured, list(self.history)
        try:
            written_under = replace(PrecisionPolicy.from_dict(self.policy), allow_unmatched=True).resolve(model)
        except PolicyError as error:
            raise PolicyError(f"The checkpoint's policy does not fit the model: {error}") from None
        reason = "resumed with another configured policy"
        changes = history_entries(written_under, policy.resolve(model), step, reason)
        return policy, configured, [*self.history, *changes]


def saved_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plugin's state in a checkpoint, whatever its class was called when it wrote it; None if there is none."""
    keys = {"configured", "history", "scaler"}
    return next((state for state in checkpoint.values() if isinstance(state, dict) and keys <= state.keys()), None)


def stock_scaler_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The loss scaler's state in a checkpoint of Lightning's own plugins; empty if there is none."""
    states = (checkpoint.get(name) for name in _STOCK_STATES)
    return next((state for state in states if isinstance(state, Mapping) and "scale" in state), {})


def history_entries(
    before: Assignment, after: Assignment, step: int, reason: str, evidence: Mapping[str, Any] | None = None
) -> list[Move]:
    """One entry per layer that changed; a subtree that changed as one is one entry, under the name of its top.

    Args:
        before: Assignment until now.
        after: Assignment from now on.
        step: Optimizer steps taken so far.
        reason: Why.
        evidence: What the change rests on, if it rests on something; goes into each entry.

    Raises:
        MixPrecError: The evidence is not of plain types.
    """
    check_plain(evidence, "evidence")
    changes = {
        name: (_told(old), _told(new))
        for name, (old, new) in before.changes_to(after).items()
        if _told(old) != _told(new)
    }
    whole = {name: change for name, change in changes.items() if _covers(before[name]) and _covers(after[name])}
    moves: list[Move] = []
    for name, (old, new) in changes.items():
        if not name or whole.get(name.rpartition(".")[0]) != (old, new):
            move: Move = {"step": step, "layer": name, "from": old[0], "to": new[0], "reason": reason}
            if old[1] != new[1]:
                move["output"] = new[1] or "as computed"
            if new[2] is not None and new[2] != old[2]:
                move["scaling"], move["gradients"] = new[2]
            if evidence is not None:
                move["evidence"] = deepcopy(dict(evidence))
            moves.append(move)
    return moves


def _told(layer: LayerPrecision) -> tuple[str, str | None, tuple[str, str] | None]:
    """What a move tells of a layer: compute, output, and of products in 8 bits scaling and gradients."""
    manner = layer.eight_bits
    return layer.compute, layer.output, (manner.scaling, manner.gradients) if layer.has_narrow_products else None


def _parts(whole: Mapping[str, Any]) -> dict[str, Shapes]:
    """The shapes of the scaler's and the ledger's state: what is no scale and no list is a count."""
    kinds = {"scale": float, "in_a_row": list[Tally], "schedules": list[tuple[Any, Any]]}
    return {part: {key: kinds.get(key, Tally) for key in whole[part]} for part in ("scaler", "steps")}


def _covers(layer: LayerPrecision) -> bool:
    """True if the rule that decided for a layer decides for those inside it, too."""
    return layer.rule is None or layer.rule.recurse


def policy_version(history: Sequence[Mapping[str, Any]]) -> int:
    """Number of changes of the policy so far; layers that moved at one step for one reason are one change.

    >>> moves = [("net.0", 10, "schedule"), ("net.2", 10, "schedule"), ("net.0", 10, "set_policy")]
    >>> policy_version([{"layer": layer, "step": step, "reason": reason} for layer, step, reason in moves])
    2
    """
    return sum(1 for _ in groupby(history, key=lambda entry: (entry["step"], entry["reason"])))


def _difference(before: str | dict[str, Any], after: str | dict[str, Any]) -> str:
    if isinstance(before, str) or isinstance(after, str):
        return f"{_brief(before)} in the checkpoint, {_brief(after)} now"
    return describe_difference(PrecisionPolicy.from_dict(before), PrecisionPolicy.from_dict(after))


def _brief(configured: str | dict[str, Any]) -> str:
    if isinstance(configured, str):
        return repr(configured)
    rules = configured.get("rules", [])
    return f"default {configured['default']} with {len(rules)} rules"
