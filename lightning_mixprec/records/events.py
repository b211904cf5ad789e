"""The record of a diagnosed overflow: a row of ``OverflowMonitor``, kept in ``OverflowMonitor.events``."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.records.schema import Count, Place

Verdict = Literal["precision", "scale", "data", "model"]
Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Frame:
    """One operation that ran.

    Attributes:
        layer: The innermost module that ran it, by its canonical name.
        direction: In which pass.
        op: Its name in ATen (``"addmm"``); a cast is ``"_to_copy"``.
        format: The format of what it made, the dtype's name where that is none.
        amin: The smallest finite magnitude it made, 0 if there is none.
        amax: The largest.
        infs: Whether it made infinities.
        nans: Whether it made NaNs.
    """

    layer: str
    direction: Direction
    op: str
    format: str
    amin: float
    amax: float
    infs: bool
    nans: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)


class Cause(TypedDict):
    """Why a step failed.

    Keys:
        verdict: ``"precision"``: finite in fp32; ``"scale"``: a smaller loss scale is enough; ``"data"``: the batch is
            not finite; ``"model"``: not finite in fp32 either.
        loss_scale: The loss scale of the step.
        layer: The layer that made a finite number non-finite, ``""`` for the LightningModule's own operations; None for
            ``"scale"`` and ``"data"``.
        direction: In which pass that was; None where there is no layer.
        op: The operation's name in ATen.
        format: The format in which it computed.
        value: The largest magnitude in fp32 of what overflowed, times the loss scale in backward.
        fits: The narrowest format that holds it.
        smaller_scale: A loss scale at which the step is finite.
        detail: What else is known.
        raised: The exception that the step raised because of it, in one line; only where it raised one.
        message: One line for a person.
    """

    verdict: Verdict
    loss_scale: NotRequired[float]
    layer: str | None
    direction: Direction | None
    op: str | None
    format: str | None
    value: float | None
    fits: str | None
    smaller_scale: NotRequired[float | None]
    detail: NotRequired[str]
    raised: NotRequired[str]
    message: NotRequired[str]


class Event(Place, Cause):
    """A diagnosed overflow.

    Keys:
        rank: Whose batch it was, where there are several.
        stage: ``"validation"`` where it was a batch of that; absent for a training batch.
        frames: The operations around it, in the file of rows alone.
    """

    rank: NotRequired[Count]
    stage: NotRequired[Literal["validation"]]
    frames: NotRequired[list[Frame]]
