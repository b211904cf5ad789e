"""The record of a change of precision: an entry of the plugin's history."""

from collections.abc import Mapping
from typing import Any, cast

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.records.schema import Count

MoveInShort = TypedDict("MoveInShort", {"step": Count, "layer": str, "from": str, "to": str, "reason": str})
"""A move as the report's rows have it."""


class Move(MoveInShort):
    """A layer that went from one compute format to another, or a subtree that changed as one.

    Keys:
        step: Optimizer steps taken before.
        layer: Its name, or that of the subtree's top.
        from: What it computed in.
        to: What it computes in.
        reason: Why.
        output: What its output is handed on in from now on, if that changes.
        evidence: Plain values that the change rests on, if it rests on something.
    """

    output: NotRequired[str]
    evidence: NotRequired[dict[str, Any]]


def told_shortly(move: Move) -> MoveInShort:
    """A move without what only the history keeps."""
    told: Mapping[str, Any] = move
    return cast(MoveInShort, {key: told[key] for key in MoveInShort.__annotations__})
