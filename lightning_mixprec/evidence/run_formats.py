"""The formats of a run, whichever plugin decides them, and fp32 in their place."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.backends import Emulate
from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.errors import SupportError
from lightning_mixprec.evidence.instruments.own_dtypes import OwnDtypes
from lightning_mixprec.numerics.formats import REFERENCE, half_dtypes, is_scaling_needed, is_wider, trained_in
from lightning_mixprec.planning.agreement import KnownNoise
from lightning_mixprec.plugin.formats_in_force import all_in_fp32
from lightning_mixprec.plugin.lightnings import Precision, both
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.plugin.strategies import check_replay
from lightning_mixprec.policy.assignment import LayerPrecision
from lightning_mixprec.policy.patterns import literal
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy

_PLAIN = both("plugins.precision", "Precision")
_HALF = both("plugins.precision", "HalfPrecision")
_MIXED = both("plugins.precision", "MixedPrecision")
_WITH_FORMATS = _HALF + _MIXED + both("plugins.precision", "DoublePrecision")


class Formats(Protocol):
    """Formats as a replay needs them."""

    def of(self, layer: str) -> str:
        """The format that a layer computes in."""

    def precision_of(self, layer: str) -> LayerPrecision:
        """All that a layer is assigned."""

    def low(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes as the run does."""

    def reference(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes in fp32, but for :attr:`not_in_fp32`; fp64 stays."""

    @property
    def is_trial(self) -> bool:
        """True where :meth:`low` is not how the run computes, so that weights are not gathered as it gathers them."""

    @property
    def not_in_fp32(self) -> dict[str, str]:
        """By layer the error that it raises in fp32; its own operations compute in the run's format all the same."""

    @property
    def searches_scale(self) -> bool:
        """True where the run searches for its loss scale, so that an overflow may be part of the search."""

    @property
    def scale(self) -> float | Tensor:
        """The present loss scale; on the device, where it may change with the next update. Never waits."""


class PluginFormats:
    """The formats of a run under :class:`PerLayerPrecision`."""

    is_trial = False

    def __init__(self, plugin: PerLayerPrecision) -> None:
        self._plugin = plugin
        self.noise = KnownNoise()
        self._own: tuple[Any, OwnDtypes] = None, OwnDtypes()

    def of(self, layer: str) -> str:
        """The format that a layer computes in."""
        return self.precision_of(layer).compute

    def precision_of(self, layer: str) -> LayerPrecision:
        """All that a layer is assigned; one that came during the run has what the layer around it has."""
        assignment = self._plugin.assignment
        assert assignment is not None
        while layer not in assignment:
            layer = layer.rpartition(".")[0]
        return assignment[layer]

    @property
    def in_use(self) -> frozenset[str]:
        """The formats that some layer computes in."""
        assignment = self._plugin.assignment
        return frozenset() if assignment is None else assignment.compute_formats

    @property
    def own(self) -> OwnDtypes:
        """The dtypes that layers' own numbers have under the present assignment, as far as somebody found them."""
        if self._own[0] is not self._plugin.assignment:
            self._own = self._plugin.assignment, OwnDtypes()
        return self._own[1]

    def low(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes as the run does."""
        return self._plugin.replay_context()

    def reference(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes in fp32, but for :attr:`not_in_fp32`; fp64 stays."""
        return self._plugin.reference_context()

    @property
    def not_in_fp32(self) -> dict[str, str]:
        """The layers that cannot compute in fp32; all formats of the plugin share them."""
        return self._plugin.not_in_fp32

    @property
    def scale(self) -> float | Tensor:
        """The present loss scale."""
        return self._plugin.scaler.present_scale if self._plugin.scaler.is_active else 1.0

    @property
    def searches_scale(self) -> bool:
        """True unless the loss scale is fixed."""
        options = self._plugin.scaler.options
        return options is not None and not options.is_static

    @property
    def is_guarded(self) -> bool:
        """True where a step with non-finite gradients is skipped."""
        return self._plugin.scaler.is_active or self._plugin.scaler.guards

    def found_inf(self, optimizer: Optimizer) -> Tensor | None:
        """The flag of non-finite gradients, while a step is prepared."""
        return self._plugin.scaler.found_inf(optimizer)

    def in_evaluation(self, module: pl.LightningModule) -> "PluginFormats":
        """The formats of validation."""
        policy = self._plugin.eval_policy
        return self if policy is None else EvaluationFormats(self._plugin, policy, module)


class TrialFormats(PluginFormats):
    """The formats of a run under a policy that is tried, and fp32 for the reference.

    Args:
        plugin: The plugin of the run.
        policy: The policy.
    """

    is_trial = True

    def __init__(self, plugin: PerLayerPrecision, policy: PrecisionPolicy) -> None:
        super().__init__(plugin)
        self._policy = policy

    def low(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes as the policy says."""
        return self._plugin.trial_context(self._policy)


class EvaluationFormats(TrialFormats):
    """The formats of evaluation under a policy of its own."""

    def __init__(self, plugin: PerLayerPrecision, policy: PrecisionPolicy, module: pl.LightningModule) -> None:
        super().__init__(plugin, policy)
        self._assignment = policy.resolve(module)

    def precision_of(self, layer: str) -> LayerPrecision:
        """All that a layer is assigned."""
        return self._assignment[layer]


def with_layer_in(formats: Formats, model: torch.nn.Module, layer: str, format: str | None) -> Formats | None:
    """The formats of a run in which a layer's own operations compute in another one; None where it cannot be tried."""
    if not isinstance(formats, PluginFormats) or formats._plugin.policy is None:
        return None
    edit: dict[str, Any] = {"compute": format} | ({"output": "fp32"} if layer else {})
    edit |= {"recurse": False} if any(True for _ in model.get_submodule(layer).children()) else {}
    return TrialFormats(formats._plugin, formats._plugin.policy.amend({literal(layer): edit}, model))


class StockFormats:
    """The formats of a run under one of Lightning's own plugins: one for all layers.

    Args:
        plugin: The plugin.
        model: The model in training.
        device: The device it is on.
    """

    searches_scale = True
    is_trial = False

    def __init__(self, plugin: Precision, model: torch.nn.Module, device: torch.device) -> None:
        self._plugin, self._model, self._device = plugin, model, device
        self.not_in_fp32: dict[str, str] = {}
        self._format = trained_in(str(plugin.precision)) or REFERENCE
        self._scaler: Any = plugin.scaler if isinstance(plugin, _MIXED) else None
        self.own, self.noise = OwnDtypes(), KnownNoise()

    def of(self, layer: str) -> str:
        """The format that all layers compute in."""
        return self._format

    def precision_of(self, layer: str) -> LayerPrecision:
        """All that a layer is assigned, were it by a policy."""
        return LayerPrecision(REFERENCE, self._format)

    @property
    def in_use(self) -> frozenset[str]:
        """The formats that some layer computes in."""
        return frozenset([self._format])

    def low(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes as the run does."""
        return self._plugin.forward_context()

    def reference(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes in fp32, but for :attr:`not_in_fp32`; fp64 stays.

        Where weights are stored in 16 bits, code of the model's own casts what it gives them to 16 bits: there layers
        have to cast what they are given.
        """
        if is_wider(self._format, REFERENCE):
            return self._plugin.forward_context()
        if not (self.not_in_fp32 or _stores_in_16_bits(self._model)):
            return torch.autocast(self._device.type, enabled=False)
        assignment = as_policy(self._format).resolve(self._model)
        return _attached(self._model, all_in_fp32(assignment, self.not_in_fp32), self._device)

    @property
    def scale(self) -> float | Tensor:
        """The present loss scale."""
        scaler = self._scaler
        if scaler is None or not scaler.is_enabled():
            return 1.0
        return scaler._scale if scaler._scale is not None else float(scaler._init_scale)

    def in_evaluation(self, module: pl.LightningModule) -> "StockFormats":
        """The formats of validation."""
        return self

    @property
    def is_guarded(self) -> bool:
        """True where a step with non-finite gradients is skipped."""
        return self._scaler is not None

    def found_inf(self, optimizer: Optimizer) -> Tensor | None:
        """The flag of non-finite gradients, while a step is prepared; None if the optimizer finds it itself (fused)."""
        states = self._scaler._per_optimizer_states if self._scaler is not None else {}
        flags = states[id(optimizer)]["found_inf_per_device"] if id(optimizer) in states else {}
        return next(iter(flags.values()), None)


class PolicyFormats:
    """The formats that a policy gives to a model without a Trainer.

    Args:
        model: The model; it is given its formats inside :meth:`low` and :meth:`reference` alone.
        policy: The policy.
        device: The device it is on.
        scale: The loss scale, where the policy has a layer compute in fp16; elsewhere it is 1.
        emulate: As for :func:`~lightning_mixprec.engine.apply.attach`.
    """

    searches_scale = False
    is_trial = True

    def __init__(
        self, model: torch.nn.Module, policy: Any, device: torch.device, scale: float, emulate: Emulate = "auto"
    ) -> None:
        self._model, self._device, self._emulate = model, device, emulate
        self.not_in_fp32: dict[str, str] = {}
        resolved: PrecisionPolicy = as_policy(policy)
        self._assignment = resolved.resolve(model)
        self.scale: float | Tensor = scale if is_scaling_needed(self._assignment.compute_formats) else 1.0

    def of(self, layer: str) -> str:
        """The format that a layer computes in."""
        return self._assignment[layer].compute

    def precision_of(self, layer: str) -> LayerPrecision:
        """All that a layer is assigned."""
        return self._assignment[layer]

    def low(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes as the policy says."""
        return _attached(self._model, self._assignment, self._device, self._emulate)

    def reference(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes in fp32, but for :attr:`not_in_fp32`; fp64 stays."""
        assignment = all_in_fp32(self._assignment, self.not_in_fp32)
        return _attached(self._model, assignment, self._device, self._emulate)


@contextlib.contextmanager
def _attached(
    model: torch.nn.Module, assignment: Mapping[str, LayerPrecision], device: torch.device, emulate: Emulate = "auto"
) -> Generator[None, None, None]:
    attachment = attach(model, assignment, device.type, emulate)
    try:
        with attachment.context():
            yield
    finally:
        attachment.detach()


def _stores_in_16_bits(model: torch.nn.Module) -> bool:
    """True if a rank's own weights or buffers are stored in 16 bits; those that are sharded stay as they are."""
    tensors = (*model.parameters(), *model.buffers())
    return any(each.dtype in half_dtypes() and not is_sharded(each) for each in tensors)


RunFormats = PluginFormats | StockFormats


def formats_of(trainer: pl.Trainer, who: str) -> RunFormats:
    """The formats of a run.

    Args:
        trainer: The Trainer.
        who: Whom an error is to name.

    Raises:
        SupportError: The steps of the Trainer's strategy or precision plugin cannot be replayed.
    """
    check_replay(trainer.strategy, who)
    plugin = trainer.precision_plugin
    if isinstance(plugin, PerLayerPrecision):
        return PluginFormats(plugin)
    if type(plugin) in _PLAIN or isinstance(plugin, _WITH_FORMATS):
        return StockFormats(plugin, trainer.lightning_module, trainer.strategy.root_device)
    raise SupportError(
        f"{who} does not know the precision plugin {type(plugin).__name__}; it works with PerLayerPrecision and "
        "with Trainer(precision='16-mixed', 'bf16-mixed', '16-true', 'bf16-true', '32-true' or '64-true')"
    )
