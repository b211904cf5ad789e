"""Loss, loss scale and skipped steps of every batch, without waiting for the device."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.run_formats import RunFormats
from lightning_mixprec.numerics.flat_batches import moved_to

_CHUNK = 50
_UNKNOWN = -1.0


class LossCurve:
    """Collects batches in chunks; a chunk is sent to the host when it is full and read when the next one is.

    Args:
        formats: The formats of the run.
        device: Where chunks are put together.
    """

    def __init__(self, formats: RunFormats, device: torch.device) -> None:
        self._formats, self._device = formats, device
        self._steps: list[int] = []
        self._rows: list[tuple[float | Tensor, float | Tensor, float | Tensor]] = []
        self._flag: float | Tensor = 0.0
        self._scale: float | Tensor = math.nan
        self._sent: tuple[list[int], Transfer] | None = None

    def begin_batch(self) -> None:
        """Notes the loss scale that the batch's step begins with."""
        scale = self._formats.scale
        self._scale = scale.detach().clone() if isinstance(scale, Tensor) else scale
        self._flag = 0.0

    def before_step(self, optimizer: Optimizer) -> None:
        """Notes the flag of non-finite gradients, where it is known."""
        flag = self._formats.found_inf(optimizer)
        if flag is not None:
            self._flag = flag if not isinstance(self._flag, Tensor) else torch.maximum(self._flag, flag)
        elif self._formats.is_guarded:
            self._flag = _UNKNOWN

    def end_batch(self, step: int, loss: float | Tensor) -> dict[str, list[Any]] | None:
        """Closes a batch.

        Args:
            step: Optimizer steps taken before it.
            loss: Its loss; the number NaN if there is none that is known.

        Returns:
            The chunk that has arrived meanwhile: ``steps``, ``loss`` (infinite for a tensor of NaN), ``scale``,
            ``skipped`` (1, 0, or None where it is not known), all of one length.
        """
        self._steps.append(step)
        self._rows.append((loss, self._scale, self._flag))
        return self._send() if len(self._rows) == _CHUNK else None

    def rest(self) -> list[dict[str, list[Any]]]:
        """The chunks that were not given out yet. Waits until they have arrived."""
        chunks = [self._send() if self._rows else None, self._received()]
        return [chunk for chunk in chunks if chunk is not None]

    def _send(self) -> dict[str, list[Any]] | None:
        arrived = self._received()
        columns = [self._column(list(column)) for column in zip(*self._rows, strict=True)]
        self._sent = self._steps, Transfer([torch.stack(columns)])
        self._steps, self._rows = [], []
        return arrived

    def _column(self, values: list[float | Tensor]) -> Tensor:
        """One number for each batch; those on the device are joined in one call, the others sent in one."""
        tensors = [value.detach().reshape(()).double() for value in values if isinstance(value, Tensor)]
        plain = [math.nan if isinstance(value, Tensor) else value for value in values]
        column = moved_to(self._device, torch.tensor(plain, dtype=torch.float64))
        if not tensors:
            return column
        told = torch.stack(tensors).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        told = moved_to(self._device, told)
        if len(tensors) == len(values):
            return told
        places = torch.tensor([place for place, value in enumerate(values) if isinstance(value, Tensor)])
        return column.index_copy(0, moved_to(self._device, places), told)

    def _received(self) -> dict[str, list[Any]] | None:
        if self._sent is None:
            return None
        (steps, transfer), self._sent = self._sent, None
        losses, scales, flags = transfer.get()[0].tolist()
        skipped = [None if flag == _UNKNOWN else int(flag > 0) for flag in flags]
        return {"steps": steps, "loss": losses, "scale": scales, "skipped": skipped}


def loss_in(outputs: Any) -> float | Tensor:
    """The loss among what ``training_step`` returned, in memory of its own; NaN if there is none.

    Lightning hands on what a manual step returns as it is, and a CUDA graph writes the next loss to the same place.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach().clone() if isinstance(loss, Tensor) and loss.numel() == 1 else math.nan
