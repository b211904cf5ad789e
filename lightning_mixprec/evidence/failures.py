"""Failed optimizer steps: noticed while their weights are in place, explained by the batches that led to them."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec import ranks
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.comparison import Comparison, Wanted
from lightning_mixprec.evidence.diagnosis import Diagnosis, Judge
from lightning_mixprec.evidence.instruments.restoring.contents import version_of
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import Formats, RunFormats
from lightning_mixprec.evidence.step_window import BatchUse, KeptBatch, Made, Outcome, RandomUse, StepWindow, received
from lightning_mixprec.numerics.finite import all_finite, are_nonfinite
from lightning_mixprec.optim.skipped_buffers import buffer_of, copy_where, is_written_in_place
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.records.words import listed

OnStep = Callable[[StepWindow, Outcome], None]


class FailureWatch:
    """Learns how optimizer steps went without waiting for the device; a callback hands on its hooks.

    On the CPU the outcome is read before an optimizer steps, if it is known by then, else after. On a device it is sent
    to the host when the batch ends and read when the next step is about to be taken, so no gap is left in its work. In
    manual optimization all outcomes come after the batch's steps were taken.

    Args:
        formats: The formats of the run.
        device: The device of the run.
        is_automatic: Whether Lightning calls the optimizer.
        on_failure: Called for a step that is to be explained. In automatic optimization its weights and formats are
            still in place, except for weights that a step which is not guarded has already lost on a device.
        on_outcome: Called once for every batch with optimizer steps, after ``on_failure``.
    """

    def __init__(
        self,
        formats: RunFormats,
        device: torch.device,
        is_automatic: bool,
        on_failure: OnStep,
        on_outcome: OnStep,
    ) -> None:
        self._formats, self._device, self._is_automatic = formats, device, is_automatic
        self._on_failure, self._on_outcome = on_failure, on_outcome
        self._batch_use, self._random_use = BatchUse(), RandomUse(device)
        self._window: StepWindow | None = None
        self._outcome: Outcome | None = None
        self._late: tuple[StepWindow, Transfer] | None = None

    @property
    def window(self) -> StepWindow | None:
        """The batches since the last optimizer step; None if there are none."""
        return self._window

    def begin_batch(self, batch: Any, batch_idx: int, made: Made | None = None) -> None:
        """Keeps a batch for the window of the next optimizer step."""
        if self._window is None:
            self._window = StepWindow(self._formats, self._device, self._is_automatic)
        self._window.add_batch(self._batch_use.begin(batch), batch_idx, self._random_use.begin(), made)

    def add_loss(self, loss: Tensor) -> None:
        """Notes a loss that goes backward."""
        if self._window is not None:
            self._window.add_loss(loss)

    def before_step(self, optimizer: Optimizer, step: int) -> None:
        """Notes that an optimizer is about to step.

        Args:
            optimizer: The optimizer.
            step: Optimizer steps taken so far.
        """
        window = self._window
        if window is None:
            return
        window.add_step(optimizer, step)
        if not self._is_automatic:
            return
        # The device has this step's work by now: waiting for the last one's outcome leaves it no gap.
        self.settle()
        is_explained = self._outcome is not None and self._outcome.is_bad  # an optimizer may evaluate more than once
        if window.is_known_before_step and not is_explained:
            self._outcome = window.read()
            self._explain(window, self._outcome)

    def end_batch(self, settles: Callable[[], bool]) -> None:
        """Closes the window if an optimizer stepped in it.

        Args:
            settles: Whether to wait for the outcome, because modules and formats will be others when the next step is
                taken; asked only of an outcome that has to be waited for.
        """
        self._batch_use.end()
        self._random_use.end()
        window, outcome = self._window, self._outcome
        if window is None or not window.steps:
            return
        self._window = self._outcome = None
        self.settle()
        if outcome is not None:
            self._on_outcome(window, outcome)
        elif window.is_late:
            self._late = window, window.send()
            if settles():
                self.settle()
        else:
            self._take_in(window, window.read())

    def settle(self) -> None:
        """Takes in the outcome that is still on its way."""
        if self._late is not None:
            (window, transfer), self._late = self._late, None
            outcome = received(transfer)
            if ranks.are_many() and window.formats.is_guarded and outcome.skipped:
                outcome = outcome._replace(loss_is_bad=ranks.is_any(outcome.loss_is_bad, self._device))
            self._take_in(window, outcome)

    def abandon(self) -> None:
        """Lets go of all batches, after an exception: what is still on its way can be counted, not replayed."""
        self._window = self._outcome = None
        if self._late is not None:
            self._late[0].batches.clear()

    def _take_in(self, window: StepWindow, outcome: Outcome) -> None:
        self._explain(window, outcome)
        self._on_outcome(window, outcome)

    def _explain(self, window: StepWindow, outcome: Outcome) -> None:
        if outcome.is_bad:
            with window.prepared():  # late, it is prepared for the next batch
                self._on_failure(window, outcome)


class Found(NamedTuple):
    """A diagnosis of a failed step, and the batch that it is of.

    Attributes:
        rank: The rank that made it.
        kept: The batch.
        diagnosis: The diagnosis.
        comparison: This rank's batch with its step in fp32, if all ranks still have theirs.
    """

    rank: int
    kept: KeptBatch
    diagnosis: Diagnosis
    comparison: Comparison | None

    @property
    def suspects(self) -> list[str]:
        """The layer that is accused, and those around it, the nearest first."""
        names = [self.diagnosis.cause["layer"] or ""]
        while names[-1]:
            names.append(names[-1].rpartition(".")[0])
        return names


class Problem(NamedTuple):
    """A batch that could not be replayed on some rank, and the reason."""

    batch_idx: int
    message: str


def diagnosed(
    replay: StepReplay, window: StepWindow, scale: float, wanted: Wanted | None = None
) -> tuple[Found | None, list[Problem]]:
    """Looks for the latest batch that a layer, the data or the model spoiled; else for one that the scale did.

    All ranks have to look together. They find the same.

    Args:
        replay: How to replay a batch.
        window: The batches of the failed step.
        scale: The loss scale of the step.
        wanted: What a decision will ask of the step in fp32; None if none is to be made.
    """
    found: Found | None = None
    problems: list[Problem] = []
    for place, kept in reversed(list(enumerate(window.batches))):
        with window.prepared(place):
            found = found and found._replace(comparison=None)  # its gradients make room for this batch's
            judge = Judge(replay, kept, scale, wanted)
            if found is not None and judge.is_finite_at(found.diagnosis.cause["smaller_scale"] or scale):
                continue
            rank, diagnosis = ranks.first_found(judge.judge())
            if judge.problem is not None:
                problems.append(Problem(kept.batch_idx, judge.problem))
            if diagnosis is not None and (found is None or diagnosis.cause["verdict"] != "scale"):
                lacks = wanted is None or ranks.is_any(judge.comparison is None, window.device)
                found = Found(rank, kept, diagnosis, None if lacks else judge.comparison)
                if diagnosis.cause["verdict"] != "scale":
                    break
    return found, [
        problem._replace(message=ranks.told_by(rank, problem.message))
        for rank, each in enumerate(ranks.all_values(problems))
        for problem in each
    ]


def diagnosed_error(
    replay: StepReplay, window: StepWindow, error: Exception, wanted: Wanted | None = None
) -> Found | None:
    """Says why the last batch's step raised, if it raises again in the run's formats and does not in fp32.

    For a single rank: others know nothing of the exception.

    Args:
        replay: How to replay a batch.
        window: The batches since the last optimizer step.
        error: The exception.
        wanted: As for :func:`diagnosed`.
    """
    judge = Judge(replay, window.batches[-1], float(window.formats.scale), wanted, may_raise=True)
    with window.prepared():
        diagnosis = judge.judge()
    if diagnosis is None or not diagnosis.cause.get("raised", "").startswith(f"{type(error).__name__}:"):
        return None
    return Found(0, window.batches[-1], diagnosis, judge.comparison)


class Broken(NamedTuple):
    """A batch whose step has left buffers that are not finite.

    Attributes:
        kept: The batch.
        names: The buffers.
    """

    kept: KeptBatch
    names: list[str]


_WATCHED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Slot = tuple[nn.Module, str]


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
