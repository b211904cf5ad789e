"""A pytest plugin under which Lightning's own tests train with ``PerLayerPrecision`` (see README.md here).

    pytest -p swap --mixprec-policy fp16 plugins models trainer

Importing this module changes nothing; :func:`install` does.
"""

import sys
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.testing import _runif
from lightning.pytorch._graveyard import precision as graveyard
from lightning.pytorch.plugins.precision import MixedPrecision as Stock
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_mixprec import LossScaling, PerLayerPrecision

POLICIES = {"16-mixed": "fp16", "bf16-mixed": "bf16"}
# No test overflows at this scale. Lightning's models do at 65536, and what follows from an overflow differs on purpose.
SCALE = 1024.0


@dataclass(frozen=True)
class Choice:
    """What takes the place of what.

    Args:
        policy: What ``16-mixed`` and ``bf16-mixed`` become: a format, or ``"asked"`` for the one that was asked for.
        plain: What ``32-true`` becomes: ``"fp32"``; ``"scaled"``, fp32 with a static loss scale; or ``"stateless"``,
            fp32 that leaves nothing in checkpoints, for tests that list all their keys.
        cuda_on_cpu: Tests that want one CUDA device run on the CPU, where ``16-mixed`` then is fp16.
    """

    policy: str | None = None
    plain: str | None = None
    cuda_on_cpu: bool = False


class _Swap:
    """The one swap of this process."""

    choice = Choice()
    patches: pytest.MonkeyPatch | None = None


class _Travelling(PerLayerPrecision):
    """Takes the swap along into processes that are spawned: whoever unpickles the plugin installs it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_choice": _Swap.choice}

    def __setstate__(self, state: dict[str, Any]) -> None:
        choice = state.pop("_choice")
        vars(self).update(state)
        if choice != Choice():
            install(choice)


class MixedPrecision(_Travelling):
    """``PerLayerPrecision`` behind the constructor of Lightning's ``MixedPrecision``."""

    def __init__(self, precision: str, device: str, scaler: Any = None) -> None:
        if precision not in POLICIES:
            raise ValueError(
                f"`Passed `{type(self).__name__}(precision={precision!r})`. "
                "Precision must be '16-mixed' or 'bf16-mixed'."
            )
        policy = POLICIES[precision] if _Swap.choice.policy in (None, "asked") else _Swap.choice.policy
        is_torchs = isinstance(scaler, torch.amp.GradScaler)
        start = LossScaling(init_scale=SCALE) if policy == "fp16" else "auto"
        super().__init__(policy, loss_scaling=_options_of(scaler) if is_torchs else start)
        if scaler is not None and not is_torchs:
            self.scaler = scaler
        self.device = device


class _IsAnyPrecision(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Precision)


class PlainPrecision(_Travelling, metaclass=_IsAnyPrecision):
    """``PerLayerPrecision`` where the Trainer would build Lightning's ``Precision`` for ``32-true``."""

    def __init__(self) -> None:
        super().__init__("fp32", loss_scaling=SCALE if _Swap.choice.plain == "scaled" else "auto")

    def state_dict(self) -> dict[str, Any]:
        return {} if _Swap.choice.plain == "stateless" else super().state_dict()


PlainPrecision.__name__ = Precision.__name__  # as Lightning's messages call it


def install(choice: Choice) -> None:
    """Puts our classes where Lightning's are bound, in every module that is imported by now."""
    if _Swap.patches is not None:
        return
    _Swap.choice, _Swap.patches = choice, pytest.MonkeyPatch()
    if choice.policy is not None:
        for module, name in bindings_of(Stock):
            _Swap.patches.setattr(module, name, MixedPrecision)
        graveyard._patch_classes()
    if choice.plain is not None:
        _Swap.patches.setattr(accelerator_connector, "Precision", PlainPrecision)
    if choice.cuda_on_cpu:
        _pretend_cuda(_Swap.patches)


def uninstall() -> None:
    """Puts Lightning's classes back."""
    if _Swap.patches is not None:
        _Swap.patches.undo()
        graveyard._patch_classes()
    _Swap.choice, _Swap.patches = Choice(), None


def bindings_of(what: object) -> list[tuple[ModuleType, str]]:
    """Where an object is bound, under any name; this module's own bindings are left alone."""
    return [
        (module, name)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and module.__name__ != __name__
        for name, value in list(vars(module).items())
        if value is what
    ]


def _options_of(scaler: torch.amp.GradScaler) -> LossScaling:
    return LossScaling(
        init_scale=scaler.get_scale(),
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
    )


def _pretend_cuda(patches: pytest.MonkeyPatch) -> None:
    init, choose = _AcceleratorConnector.__init__, _AcceleratorConnector._check_and_init_precision

    @wraps(init)
    def init_on_cpu(self: Any, *args: Any, **arguments: Any) -> None:
        if arguments.get("accelerator") in ("gpu", "cuda"):
            devices = arguments.get("devices", 1)
            arguments |= {"accelerator": "cpu", "devices": len(devices) if isinstance(devices, list) else devices}
        init(self, *args, **arguments)

    @wraps(choose)
    def choose_fp16_on_cpu(self: Any) -> Precision:
        asked = self._precision_flag
        if asked == "16-mixed" and self._accelerator_flag == "cpu" and self._precision_plugin_flag is None:
            return accelerator_connector.MixedPrecision(asked, "cpu")
        return choose(self)

    patches.setattr(_AcceleratorConnector, "__init__", init_on_cpu)
    patches.setattr(_AcceleratorConnector, "_check_and_init_precision", choose_fp16_on_cpu)
    patches.setattr(_runif, "num_cuda_devices", lambda: 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mixprec", "lightning_mixprec in the place of Lightning's precision plugins")
    group.addoption(
        "--mixprec-policy",
        choices=["fp16", "bf16", "asked"],
        help="replace MixedPrecision: always by this format, or by the one that a test asks for",
    )
    group.addoption(
        "--mixprec-plain",
        choices=["fp32", "scaled", "stateless"],
        help="replace the Precision that 32-true builds: by fp32, with a static loss scale, or without saved state",
    )
    group.addoption(
        "--mixprec-cuda-on-cpu",
        action="store_true",
        help="run tests that want one CUDA device on the CPU, with 16-mixed in fp16",
    )


def pytest_configure(config: pytest.Config) -> None:
    install(
        Choice(
            config.getoption("--mixprec-policy"),
            config.getoption("--mixprec-plain"),
            config.getoption("--mixprec-cuda-on-cpu"),
        )
    )


def pytest_unconfigure() -> None:
    uninstall()


def pytest_report_header() -> str:
    return f"mixprec: {_Swap.choice}"
