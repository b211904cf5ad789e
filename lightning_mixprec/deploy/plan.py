"""``plan``: which formats a module is to train in, measured on a few batches, solved for, and checked by running it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_mixprec.deploy.plan_check import PlanCheck
from lightning_mixprec.deploy.prepared import check_count, check_trainer, is_datamodule, prepared
from lightning_mixprec.errors import PlanError, SupportError
from lightning_mixprec.evidence.by_hand import module_of
from lightning_mixprec.evidence.measuring.costs import measure_costs
from lightning_mixprec.evidence.measuring.sensitivities import measure_sensitivities
from lightning_mixprec.numerics.devices.named import named_device
from lightning_mixprec.numerics.formats import REFERENCE, compute_formats, is_wider
from lightning_mixprec.planning.budgets import check_budget
from lightning_mixprec.planning.plan import PrecisionPlan
from lightning_mixprec.policy.idle_rules import covered_layers
from lightning_mixprec.policy.rules import did_you_mean


def plan(
    module: pl.LightningModule,
    batches: Any = None,
    *,
    formats: Sequence[str] = ("bf16", "fp32"),
    device: str | None = None,
    budget: Mapping[str, float] | None = None,
    pin: str | Sequence[str] = (),
    seed: int = 0,
    trainer: pl.Trainer | None = None,
    max_batches: int = 4,
) -> PrecisionPlan:
    """Chooses the format that each layer of a module is to compute in, and checks the choice on the batches.

    What each format would do to the loss is measured layer by layer, what it would save is measured or, for a device
    that is not here, predicted from its table; the choice is the best within the budget. Its policy is then run on
    the batches beside fp32, and the measured loss gap, gradient cosine and, on the device at hand, step time stand
    beside the predicted. Nothing of the module changes.

    Args:
        module: The LightningModule, on the device where it is to compute.
        batches: What its ``training_step`` takes, on its device: an iterable of batches. With a Trainer: a
            LightningDataModule, or None for the module's own data.
        formats: The formats that are offered; fp32 is always among them.
        device: The device to plan for: None for where the module is, or a name such as ``"h100"``.
        budget: A mapping with any of ``loss_gap`` (in the units of the loss, at most), ``time`` and ``memory`` (at
            most, as a share of all in fp32) and ``low_precision_share`` (of the matrix products' flops, at least). The
            loss gap is made as small as it allows; where it says a loss gap alone, the time is. None for the least
            time at no more loss gap than the uniform 16-bit policy is predicted to have.
        pin: Patterns of layers that stay in fp32.
        seed: Of the random numbers that batches begin with.
        trainer: A Trainer, of whose run module, batches and optimizers are taken, as they are before its first step;
            no step is taken. Without one, memory is that with torch's AdamW.
        max_batches: How many of the batches are looked at, at most.

    Returns:
        A :class:`PrecisionPlan`; ``print`` it. Where the promise was not kept it says so, and ``.wider`` has the next
        wider plan.

    Raises:
        MixPrecError: An argument is malformed, a batch does not fit the module, its step is not finite in fp32, or
            nothing is within the budget; one line that says what is to be done.
    """
    module = module_of(module, "plan")
    offered, asked, pinned = _offered(formats), check_budget(budget), _strings("pin", pin)
    check_count("max_batches", max_batches)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise PlanError(f"seed is {seed!r}; it has to be a whole number, as torch.manual_seed takes it")
    if trainer is not None:
        check_trainer(trainer)
    if device is not None:
        named_device(device)
    covered_layers(pinned, module, "plan(pin=...)")

    def work(module: pl.LightningModule, batches: Sequence[Any]) -> PrecisionPlan:
        check = PlanCheck(module, batches, seed)
        check.check_reference()
        sensitivities = measure_sensitivities(module, batches, offered, pin=pinned, seed=seed)
        costs = measure_costs(module, batches, offered, device=device, optimizer=_optimizers(module))
        made = PrecisionPlan.of(module, sensitivities, costs, offered, asked)
        measured = check.measured(made.policy, timed=_is_at_hand(device, module.device))
        return replace(made, measured=measured)

    if trainer is None:
        return work(module, _batches(batches, max_batches))
    if batches is not None and not is_datamodule(batches):
        raise PlanError("with a Trainer, batches are those of its run; give a LightningDataModule, or leave them out")
    return prepared(trainer, module, work, datamodule=batches, batches=max_batches)


def _offered(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, the reference included, each once."""
    given = _strings("formats", formats)
    known = [each for each in compute_formats() if not is_wider(each, REFERENCE)]
    for each in given:
        if each not in known:
            raise PlanError(f"formats has {each!r}{did_you_mean(str(each), known)} what can be offered is {known}")
    if not set(given) - {REFERENCE}:
        raise PlanError("formats offers nothing but fp32, so there is nothing to choose; give ('bf16', 'fp32'), say")
    return tuple(dict.fromkeys((*given, REFERENCE)))


def _strings(argument: str, given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise PlanError(f"{argument} is {given!r}; give a string or a list of strings")
    return tuple(given)


def _batches(batches: Any, most: int) -> list[Any]:
    if batches is None or isinstance(batches, (str, bytes, Mapping)) or not hasattr(batches, "__iter__"):
        raise PlanError(
            f"batches is a {type(batches).__name__}; give a list of what training_step takes, or trainer=... for the "
            "module's own data"
        )
    if isinstance(batches, torch.Tensor):
        raise PlanError("batches is a Tensor; give a list of what training_step takes, [batch] for a single one")
    taken = list(islice(batches, most))
    if not taken:
        raise PlanError("batches has no batch; give one at least")
    return taken


def _optimizers(module: pl.LightningModule) -> Sequence[Optimizer] | None:
    """Those of a module in a run; None without one."""
    return module.trainer.optimizers if module._trainer is not None else None


def _is_at_hand(device: str | None, here: torch.device) -> bool:
    """True if the plan is for the device that the module is on."""
    if device is None:
        return True
    try:
        name = torch.cuda.get_device_name(here) if here.type == "cuda" else here.type
        return named_device(device) == named_device(name)
    except SupportError:
        return False
