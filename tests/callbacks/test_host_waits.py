"""What an ordinary step waits for: nothing with fused optimizers, one flag for each other one; the rest comes late.

The CPU stands in for an accelerator: fused optimizers obey the flag that is not read, outcomes come a step later, and
whatever reads a number that was not sent to the host is noted. The same runs on CUDA, where torch itself refuses to
wait.
"""

import warnings
from collections import Counter

import pytest
import torch
from lightnings import pl
from plugin_models import Batches, Task, fit, ours, stock
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, PrecisionReport, UnderflowMonitor
from lightning_mixprec.engine import transfer
from lightning_mixprec.evidence.buffers import BufferWatch
from lightning_mixprec.evidence.step_window import StepWindow
from lightning_mixprec.optim import loss_scaling

READ_BY_OPERATIONS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2"}
READ_BY_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class Operations(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in READ_BY_OPERATIONS:
            self.note(func._opname, args[0])
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """What operations do not show: values that are taken out of a tensor as they are."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READ_BY_METHODS:
            self.note(func.__name__, args[0])
        return func(*args, **(kwargs or {}))


class Noting:
    """Notes what is read on the host while a batch is trained on, unless it was sent there before."""

    def __init__(self):
        self.noted, self.sent = Counter(), []
        self.modes = Methods(self.note), Operations(self.note)

    def send(self, tensor):
        self.sent.append(tensor.clone())
        return self.sent[-1]

    def note(self, name, tensor):
        if tensor.dtype == torch.uint8:
            return  # the states of generators, which are on the host
        if all(tensor.untyped_storage().data_ptr() != each.untyped_storage().data_ptr() for each in self.sent):
            self.noted[name] += 1

    def begin(self):
        for mode in self.modes:
            mode.__enter__()

    def end(self):
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


class Refusing:
    """Has torch raise where the host waits for the device."""

    noted = Counter()

    def begin(self):
        torch.cuda.set_sync_debug_mode("error")

    def end(self):
        torch.cuda.set_sync_debug_mode("default")


class Counting:
    """Counts how often the host waits for the device, of which torch warns."""

    def __init__(self):
        self.noted = Counter()

    def begin(self):
        self.catching = warnings.catch_warnings(record=True)
        self.caught = self.catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def end(self):
        torch.cuda.set_sync_debug_mode("default")
        self.catching.__exit__(None, None, None)
        if waits := sum("synchronizing CUDA operation" in str(each.message) for each in self.caught):
            self.noted["_local_scalar_dense"] += waits


class First(pl.Callback):
    """Begins to watch before all other callbacks, once all is learned and made and the first steps are sampled."""

    def __init__(self, watch):
        self.watch = watch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx >= BEFORE:
            self.watch.begin()


class Last(First):
    """Ends after all others."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx >= BEFORE:
            self.watch.end()


@pytest.fixture(params=["the CPU for CUDA", pytest.param("cuda", marks=pytest.mark.gpu)])
def watch(request, monkeypatch):
    if request.param == "cuda":
        yield Refusing()
        torch.cuda.set_sync_debug_mode("default")
        return
    monkeypatch.setattr(loss_scaling, "_is_read", lambda optimizer, _: not loss_scaling.obeys_found_inf(optimizer))
    for late in ((StepWindow, "is_late"), (BufferWatch, "_is_late")):
        monkeypatch.setattr(*late, property(lambda self: True))
    noting = Noting()
    monkeypatch.setattr(transfer, "_to_host", noting.send)
    yield noting


class Quiet(Task):
    """Keeps nothing on the host."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def sgd(params, fused):
    return torch.optim.SGD(params, lr=0.01, momentum=0.5, fused=fused)


BEFORE, BATCHES = 20, 24
POLICIES = {
    "fp16": lambda: ours("fp16"),
    "bf16": lambda: ours("bf16"),
    "fp32": lambda: ours("fp32"),
    "norms in fp32": lambda: ours({"default": "fp16", "net.1": "fp32"}),
    "weights in fp64": lambda: ours({"default": "bf16", "net.3": "p=fp64"}),
}
WATCHING = {
    "nobody": list,
    "monitors": lambda: [OverflowMonitor(), UnderflowMonitor(1000), FidelityMonitor(1000)],
    "report": lambda: [PrecisionReport(1000)],
    "controller": lambda: [AdaptivePrecision(every_n_steps=1000)],
}


def reads(watch, model, plugin, callbacks, **options):
    """How often the host has read a number, over the batches that were watched."""
    accelerator = "cpu" if isinstance(watch, Noting) else "cuda"
    callbacks = [First(watch), *callbacks, Last(watch)]
    options = {"log_every_n_steps": 1000, "accelerator": accelerator} | options
    fit(model, plugin, Batches(6, count=BATCHES), callbacks=callbacks, **options)
    return dict(watch.noted)


@pytest.mark.parametrize("watching", WATCHING)
@pytest.mark.parametrize("policy", POLICIES)
def test_with_a_fused_optimizer_nothing_is_read(watch, policy, watching):
    model = Quiet(net(), lambda params: sgd(params, fused=True))
    assert reads(watch, model, POLICIES[policy](), WATCHING[watching]()) == {}


def test_accumulation_and_clipping_read_nothing(watch):
    model = Quiet(net(), lambda params: sgd(params, fused=True))
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    assert reads(watch, model, POLICIES["fp16"](), WATCHING["monitors"](), **options) == {}


@pytest.mark.parametrize("watching", WATCHING)
def test_without_a_guard_no_optimizer_is_waited_for(watch, watching):
    model = Quiet(net(), lambda params: sgd(params, fused=False))
    assert reads(watch, model, ours("bf16", skip_nonfinite=False), WATCHING[watching]()) == {}


@pytest.mark.parametrize("watching", WATCHING)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_other_optimizer_is_waited_for_by_one_flag_a_step(policy, watching, watch):
    watch = Counting() if isinstance(watch, Refusing) else watch
    model = Quiet(net(), lambda params: sgd(params, fused=False))
    assert reads(watch, model, POLICIES[policy](), WATCHING[watching]()) == {"_local_scalar_dense": BATCHES - BEFORE}


def test_stock_fp16_waits_for_one_flag_a_step_as_well(watch):
    watch = Counting() if isinstance(watch, Refusing) else watch
    model = Quiet(net(), lambda params: sgd(params, fused=False))
    plugin = stock("fp16", "cpu" if isinstance(watch, Noting) else "cuda")
    assert reads(watch, model, plugin, []) == {"_local_scalar_dense": BATCHES - BEFORE}
