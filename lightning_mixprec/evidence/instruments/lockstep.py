"""Steps that send messages between ranks (SyncBatchNorm, ``all_gather``), replayed on all ranks or on none.

A rank whose replay fails sends none of the messages that are left, and the others would wait for them for ever. So all
ranks meet before each message, on the host and beside the devices' own communication; a rank that cannot go on calls
the next meeting off, which ends the others' replays, too. Steps without messages never meet.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_any_sharded
from lightning_mixprec.errors import OtherRankError, one_line
from lightning_mixprec.evidence.instruments.memory import is_out_of_memory

_FROM_ONE_TO_ONE = {"send", "recv_", "recv_any_source_"}
_MADE = itertools.count()
_REPLAYED_TOGETHER = itertools.count()


class Lockstep:
    """The replays of one batch, which all ranks make in the same order.

    Args:
        module: What is replayed. Sharded weights are replayed :func:`together` anyhow.
    """

    def __init__(self, module: nn.Module) -> None:
        self._name = next(_MADE)
        self._is_needed = ranks.are_many() and not is_any_sharded(module)

    @contextlib.contextmanager
    def attempt(self, name: str, *, is_repeated: bool = False) -> Iterator[None]:
        """Within, ranks meet before each message to all of them.

        Args:
            name: Of the attempt, the same on all ranks.
            is_repeated: Whether all ranks try once more if one runs out of memory; then they meet at the end, too.

        Raises:
            OtherRankError: Another rank has failed before a message, or is to try once more.
        """
        if not self._is_needed:
            yield
            return
        meetings = self._meetings(name)
        try:
            with _Messages(meetings):
                yield
            if is_repeated and meetings.held:
                meetings.end()
        except OtherRankError:
            raise
        except BaseException as error:
            meetings.call_off(error)
            raise

    def call_off(self, name: str, error: BaseException) -> None:
        """Ends an attempt of the others in which this rank does not take part, at its first message."""
        if self._is_needed:
            self._meetings(name).call_off(error)

    def _meetings(self, name: str) -> "_Meetings":
        return _Meetings(f"lightning_mixprec/{self._name}/{name}")


@contextlib.contextmanager
def together(module: nn.Module) -> Iterator[None]:
    """All ranks replay something on sharded weights, to the end or not at all; without such weights each as it can.

    Args:
        module: What is replayed.

    Raises:
        OtherRankError: Another rank has failed.
    """
    if not (ranks.are_many() and is_any_sharded(module)):
        yield
        return
    meetings = _Meetings(f"lightning_mixprec/together/{next(_REPLAYED_TOGETHER)}")
    try:
        with _Messages(meetings, of_groups=True):
            yield
        meetings.hold()
    except OtherRankError:
        raise
    except BaseException as error:
        meetings.call_off(error)
        meetings.tell_memory(error)
        raise


class _Meetings:
    """Meetings of all ranks, one after the other.

    Args:
        name: Of the attempt.
    """

    def __init__(self, name: str) -> None:
        c10d: Any = distributed.distributed_c10d
        self._store = c10d.PrefixStore(name, c10d._get_default_store())
        self.held = 0

    def hold(self) -> None:
        """Waits for all ranks. Raises what one of them called it off for."""
        outcome = f"{self.held} outcome"
        if self._store.add("arrived", 1) == (self.held + 1) * ranks.count():
            self._store.set(outcome, "")
            if self.held:  # all have read the outcome of the one before
                self._store.delete_key(f"{self.held - 1} outcome")
        elif told := self._store.get(outcome).decode():
            raise _error(told)
        self.held += 1

    def tell_memory(self, error: BaseException) -> None:
        """Raises what another rank called the same meeting off for, if that and this rank's error differ in kind."""
        told = self._store.get(f"{self.held} outcome").decode()
        is_short = isinstance(error, Exception) and is_out_of_memory(error)
        if isinstance(error, Exception) and is_short != told.startswith("memory"):
            raise _error(told) from error

    def end(self) -> None:
        """Waits for all ranks at the end, and raises if one is short of memory: what else has failed costs that one."""
        try:
            self.hold()
        except OtherRankError as error:
            if error.is_out_of_memory:
                raise

    def call_off(self, error: BaseException) -> None:
        """Has the ranks that wait in the next meeting go home, unless another rank has done so."""
        said = one_line(error) if isinstance(error, Exception) else type(error).__name__
        kind = "memory" if isinstance(error, Exception) and is_out_of_memory(error) else "error"
        message = f"rank {distributed.get_rank()} could not go on with it ({said})"
        self._store.compare_set(f"{self.held} outcome", "", f"{kind} {message}")


class _Messages(TorchDispatchMode):
    """Holds a meeting before each message to all ranks, and where weights are sharded to groups of them, too.

    Args:
        meetings: The meetings.
        of_groups: Whether all ranks send the messages in groups of some ranks at the same time, each in its group.
    """

    def __init__(self, meetings: _Meetings, *, of_groups: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._meetings, self._least = meetings, 2 if of_groups else ranks.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "full_tensor") for each in types):
            return NotImplemented  # its own operations follow, with their messages
        if func.namespace in ("c10d", "_c10d_functional") and self._is_met_before(func, args):
            self._meetings.hold()
        return func(*args, **(kwargs or {}))

    def _is_met_before(self, func: Any, args: Any) -> bool:
        """True for a message in which all ranks take part."""
        if func._opname in _FROM_ONE_TO_ONE:
            return False
        return any(group is not None and group.size() >= self._least for group in map(_group, args))


def _error(told: str) -> OtherRankError:
    kind, _, message = told.partition(" ")
    return OtherRankError(message, is_out_of_memory=kind == "memory")


def _group(argument: Any) -> Any:
    """The group of ranks that an argument of a message is, or names."""
    if isinstance(argument, str):
        c10d: Any = distributed.distributed_c10d
        with contextlib.suppress(Exception):  # the name of an operation, or of nothing
            return c10d._resolve_process_group(argument)
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return distributed.ProcessGroup.unbox(argument)
    return None
