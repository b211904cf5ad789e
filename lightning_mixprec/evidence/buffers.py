"""Buffers that a step leaves not finite although it did not fail: watched, kept, and explained."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.comparison import Wanted
from lightning_mixprec.evidence.diagnosis import Judge
from lightning_mixprec.evidence.failures import Found
from lightning_mixprec.evidence.instruments.restoring.contents import version_of
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import Formats
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.numerics.finite import all_finite, are_nonfinite
from lightning_mixprec.optim.skipped_buffers import buffer_of, copy_where, is_written_in_place
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.records.words import listed

_WATCHED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Slot = tuple[nn.Module, str]


class Broken(NamedTuple):
    """A batch whose step has left buffers that are not finite.

    Attributes:
        kept: The batch.
        names: The buffers.
    """

    kept: KeptBatch
    names: list[str]


class BufferWatch:
    """The floating-point buffers that training changes: watched, and kept as they were when all of them were finite.

    Buffers that are not finite to begin with are the model's affair. Which ones training changes is learned from their
    versions: by module, as BatchNorm's kernels give its statistics no new version, but it counts its batches. On a
    device the answer comes a batch later, so that nothing waits for it.

    Args:
        model: The model in training.

    Attributes:
        acquitted: Buffers that are watched no more.
    """

    def __init__(self, model: nn.Module) -> None:
        slots = {
            (f"{node.name}.{name}" if node.name else name): (node.module, name)
            for node in walk(model)
            for name, _ in node.module._buffers.items()
        }
        found = _present(slots)
        bad = are_nonfinite(list(found.values()))
        self._still = {key: slots[key] for key, is_bad in zip(found, bad, strict=True) if not is_bad}
        self._moving: dict[str, _Slot] = {}
        self._good = {key: found[key].clone() for key in self._still}
        self._versions: dict[str, tuple[Any, ...]] = {}
        self._was_good = torch.tensor(True)
        self._late: tuple[KeptBatch, Transfer] | None = None
        self._answer: list[Broken | None] = []
        self.acquitted = set[str]()

    @torch.no_grad()
    def begin(self) -> None:
        """Notes buffers before a batch, unless one of them is not finite."""
        self._answer.clear()
        self._versions = {key: _versions(module) for key, (module, _) in self._still.items()}
        now = _present(self._moving)
        same = [key for key, buffer in now.items() if key in self._good and buffer.shape == self._good[key].shape]
        if same:
            self._was_good = is_good = all_finite(list(now.values()))
            copy_where(is_good, [now[key] for key in same], [self._good[key] for key in same])

    def end(self, kept: KeptBatch) -> Broken | None:
        """The batch that left buffers not finite: this one, or the last one on a device; the same for all who ask."""
        if not self._answer:
            moved = [key for key, (module, _) in self._still.items() if _versions(module) != self._versions.get(key)]
            self._moving |= {key: self._still.pop(key) for key in moved}
            self._good = {key: good for key, good in self._good.items() if key in self._moving}
            self._answer.append(self._read(kept))
        return self._answer[0]

    def _read(self, kept: KeptBatch) -> Broken | None:
        now = self.tensors()
        if not now:
            return None
        earlier = self.settle()
        if earlier is None:
            self._late = kept, Transfer([all_finite(now) | ~self._was_good.to(now[0].device)])
        return earlier or (None if self._is_late else self.settle())

    def settle(self) -> Broken | None:
        """The last batch, if it left buffers not finite and nobody was told yet. Waits for the device."""
        late, self._late = self._late, None
        if late is None or late[1].get()[0]:
            return None
        now = _present(self._moving)
        names = [key for key, is_bad in zip(now, are_nonfinite(list(now.values())), strict=True) if is_bad]
        return Broken(late[0], names) if names else None

    @property
    def _is_late(self) -> bool:
        """True where reading would wait for a device."""
        return self.tensors()[0].device.type != "cpu"

    def tensors(self) -> list[Tensor]:
        """The buffers that training changes."""
        return list(_present(self._moving).values())

    def acquit(self, names: Sequence[str]) -> None:
        """Watches these no more: they would not be finite in fp32 either."""
        self.acquitted.update(names)
        self._moving = {key: slot for key, slot in self._moving.items() if key not in names}

    @contextlib.contextmanager
    def as_they_were(self, *, if_late: bool = False) -> Generator[None, None, None]:
        """Inside, the buffers are what they were when all were finite; ``if_late``: where an answer is on its way."""
        now = _present(self._moving) if self._late is not None or not if_late else {}
        self._set({key: self._good.get(key, buffer) for key, buffer in now.items()})
        try:
            yield
        finally:
            self._set(now)

    def _set(self, buffers: Mapping[str, Tensor]) -> None:
        for key, buffer in buffers.items():
            module, name = self._moving[key]
            module._buffers[name] = buffer

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes the buffers what they were when all of them were finite."""
        for key, now in _present(self._moving).items():
            good = self._good.get(key, now)
            if now.shape == good.shape:
                now.copy_(good)
            else:
                self._set({key: good.clone()})


def _present(slots: Mapping[str, _Slot]) -> dict[str, Tensor]:
    """The buffers that can be watched: plain tensors of real numbers that can be written to."""
    buffers = {key: buffer_of(module, name) for key, (module, name) in slots.items()}
    return {key: buffer for key, buffer in buffers.items() if type(buffer) is Tensor and _is_watched(buffer)}


def _is_watched(buffer: Tensor) -> bool:
    return buffer.dtype in _WATCHED and buffer.numel() > 0 and is_written_in_place(buffer)


def _versions(module: nn.Module) -> tuple[Any, ...]:
    buffers = (buffer for buffer in module._buffers.values() if buffer is not None)
    return tuple((id(buffer), version_of(buffer)) for buffer in buffers)


class BufferReplay(StepReplay):
    """Replays a training step; the size of what it leaves in watched buffers is one more of its losses."""

    def __init__(self, module: pl.LightningModule, formats: Formats, device: torch.device, watch: BufferWatch) -> None:
        super().__init__(module, formats, device)
        self._watch = watch

    def _take(self, step: Any, batch: Any, batch_idx: int) -> None:
        super()._take(step, batch, batch_idx)
        sizes = [buffer.detach().float().abs().mean() for buffer in self._watch.tensors()]
        step.replayed.losses.append(torch.stack(sizes).sum())


def diagnosed_buffers(replay: BufferReplay, broken: Broken, wanted: Wanted | None = None) -> Found | None:
    """Says why a step left buffers not finite; None if it does not, replayed. For a single rank."""
    try:
        with replay.opened() as stand_ins:
            losses = replay.run(stand_ins, *broken.kept[:2], random=broken.kept.random).losses[:-1]
    except Exception:  # a callback that watches ends no run
        return None
    if not all_finite(losses):
        return None  # the step has failed, which is told of as such
    judge = Judge(replay, broken.kept, float(replay.formats.scale), wanted)
    diagnosis = judge.judge()
    if diagnosis is None:
        return None
    told = f"in buffers alone ({listed(broken.names)}), {diagnosis.cause['message']}"
    return Found(0, broken.kept, replace(diagnosis, cause={**diagnosis.cause, "message": told}), judge.comparison)
