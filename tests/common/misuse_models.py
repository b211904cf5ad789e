"""Odd models and odd data, trained as a user would: under a mixed policy, watched by every callback, end to end."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightnings import pl
from plugin_models import PLAIN_SGD, Batches, Task, fit, ours, same
from selection import slow_but_for
from torch import Tensor, nn

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, PerLayerPrecision, UnderflowMonitor

FORMATS = ("fp16", "bf16")
every_format = pytest.mark.parametrize("format", slow_but_for({"fp16"}, FORMATS))
TOLERANCE = {"fp16": 5e-3, "bf16": 5e-2}
"""How far losses may be from fp32's, as a share, in runs of a few steps."""


class Run(NamedTuple):
    """A run that was watched."""

    model: Any
    plugin: PerLayerPrecision
    trainer: pl.Trainer
    rows: list[dict[str, Any]]

    @property
    def problems(self) -> list[str]:
        """What the callbacks could not do."""
        return [row["problem"] for row in self.rows if "problem" in row]

    @property
    def overflows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["monitor"] == "overflow"]


def watchers() -> list[pl.Callback]:
    """Everything that watches, looking at every batch."""
    sampling = [UnderflowMonitor(every_n_steps=1), FidelityMonitor(every_n_steps=1)]
    return [OverflowMonitor(), *sampling, AdaptivePrecision(every_n_steps=1)]


def watched(model: pl.LightningModule, policy: Any, batches: Any = None, **options: Any) -> Run:
    """Trains a model under a policy with every callback attached; any warning that is not expected is an error."""
    plugin = policy if isinstance(policy, PerLayerPrecision) else ours(policy)
    callbacks = [*watchers(), *options.pop("callbacks", ())]
    torch.manual_seed(1)
    trainer = fit(model, plugin, batches, callbacks=callbacks, default_root_dir="watched", **options)
    return Run(model, plugin, trainer, rows_in("watched"))


def rows_in(folder: str) -> list[dict[str, Any]]:
    """The rows of a run's JSONL file; none if the run wrote no file."""
    path = Path(folder, "mixprec.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def seeded(make: Callable[[], Any]) -> Any:
    """A model with the same first weights every time; not every model can be copied."""
    torch.manual_seed(0)
    return make()


def check_healthy(
    make: Callable[[], Any],
    policy: Any,
    batches: Any = None,
    callbacks: Callable[[], list[pl.Callback]] = list,
    **options: Any,
) -> Run:
    """Trains a model watched, unwatched and in Lightning's own fp32, and compares.

    Watching must not change a bit or meet a problem, and the losses must be those of fp32 up to rounding.
    """
    run = check_unchanged_by_watching(make, policy, batches, callbacks, **options)
    wide = seeded(make)
    torch.manual_seed(1)
    fit(wide, None, batches, callbacks=callbacks(), **options)
    assert run.problems == []
    near = TOLERANCE["bf16" if "bf16" in str(policy) else "fp16"]
    assert torch.allclose(torch.stack(run.model.losses).float(), torch.stack(wide.losses).float(), rtol=near)
    return run


def check_unchanged_by_watching(
    make: Callable[[], Any],
    policy: Any,
    batches: Any = None,
    callbacks: Callable[[], list[pl.Callback]] = list,
    **options: Any,
) -> Run:
    """Trains a model watched and unwatched, and compares every bit."""
    model, plain = seeded(make), seeded(make)
    start = dense_state(plain)
    run = watched(model, policy, batches, callbacks=callbacks(), **options)
    torch.manual_seed(1)
    fit(plain, ours(policy), batches, callbacks=callbacks(), **options)
    assert same([loss.nan_to_num(-1.0) for loss in model.losses], [loss.nan_to_num(-1.0) for loss in plain.losses])
    assert same(dense_state(model), dense_state(plain))
    assert not same(dense_state(plain), start)
    return run


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to_dense().clone()
        for name, tensor in model.state_dict().items()
        if not nn.parameter.is_lazy(tensor)
    }


def mixed(format: str, layer: str = "net.2") -> dict[str, str]:
    """A policy in which one layer, the head of :func:`around`, computes in fp32."""
    return {"default": format, layer: "fp32"}


def inverse(format: str, layer: str = "net.1") -> dict[str, str]:
    """A policy in which one layer alone, the odd one of :func:`around`, does not compute in fp32."""
    return {"default": "fp32", layer: format}


def around(layer: nn.Module) -> nn.Sequential:
    """An odd layer from 8 features to 8 between two ordinary ones; from 6 features to 2."""
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 2))


def plain_task() -> Task:
    return Task(around(nn.Tanh()), PLAIN_SGD)


class Given:
    """A loader that hands on what it is given, whatever that is."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Four ordinary batches."""
    return [(x.clone(), y.clone()) for x, y in Batches(6)]
