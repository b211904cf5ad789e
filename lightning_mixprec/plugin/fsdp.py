"""``PerLayerFSDPPrecision``: the plugin under Lightning's ``FSDPStrategy``, which takes no plugin of another kind."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec.errors import PolicyError, SupportError
from lightning_mixprec.numerics.formats import REFERENCE, format_of, get_format, half_dtypes, is_wider
from lightning_mixprec.optim.loss_scaling_options import LossScaling
from lightning_mixprec.plugin.lightnings import FSDPPrecision, check_lightning_module
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.assignment import Assignment
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.policy.policy import PrecisionPolicy


class PerLayerFSDPPrecision(PerLayerPrecision, FSDPPrecision):  # type: ignore[misc]
    """:class:`PerLayerPrecision` for ``Trainer(strategy=FSDPStrategy(), plugins=...)``, with loss scaling for fp16.

    Layers compute in the formats of the policy; weights are gathered and gradients reduced as they are stored, so that
    results are those of DDP. Where whole wrapped modules compute in one 16-bit format, ``FSDPStrategy(mixed_precision=
    MixedPrecision(param_dtype=...))`` has them gathered in it; classes in its ``_module_classes_to_ignore`` are not.
    FSDP2 (``ModelParallelStrategy`` with :meth:`PerLayerPrecision.fully_shard`) does this by layer; callbacks that
    replay steps work there alone. Takes the arguments of :class:`PerLayerPrecision`.

    Raises:
        MixPrecError: An argument is malformed; one line that says what is allowed.
    """

    _IN_ROWS = "PerLayerFSDPPrecision"

    @property
    @override
    def mixed_precision_config(self) -> Any:
        """None: weights are gathered as they are stored, unless the strategy says otherwise."""
        return None

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        if not check_lightning_module(module).automatic_optimization:
            raise SupportError(
                "FSDPStrategy runs training_step inside the wrapped forward, where torch's FSDP cannot run backward: "
                "manual optimization does not work with it; use ModelParallelStrategy (FSDP2)."
            )
        super().convert_module(module)
        for assignment in filter(None, (self._formats.training_assignment, self._formats.evaluation_assignment)):
            _check_storage(assignment)
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        for assignment in filter(None, (self._formats.training_assignment, self._formats.evaluation_assignment)):
            _check_gathered(model, assignment)
        return super().connect(model, optimizers, lr_schedulers)

    @override
    def _fitted(self, policy: PrecisionPolicy) -> tuple[Assignment, LossScaling | None]:
        model = self._running_model()
        assignment, options = super()._fitted(policy)
        _check_storage(assignment)
        _check_gathered(model.trainer.strategy.model or model, assignment)
        return assignment, options

    @override
    def tensor_init_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    module_init_context = tensor_init_context

    @override
    def convert_output(self, data: Any) -> Any:
        return data

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        """Clips the norm of all gradients, over all ranks."""
        if len(self._optimizers) > 1:
            raise SupportError(
                "FSDP clips the norm of all gradients together, and there are several optimizers; use "
                "gradient_clip_algorithm='value', or ModelParallelStrategy (FSDP2)."
            )
        model = self._current_model()
        root: Any = model.trainer.strategy.model if model is not None else None
        root.clip_grad_norm_(float(clip_val))


def _check_storage(assignment: Assignment) -> None:
    for name, layer in assignment.items():
        if is_wider(layer.compute, REFERENCE) or layer.param not in (REFERENCE, layer.region):
            raise SupportError(
                f"layer {name!r} stores its weights in {layer.param} and computes in {layer.compute}, for which FSDP "
                "would have to hold casts of them; use fp32 weights and fp32, bf16 or fp16 operations, or "
                "ModelParallelStrategy (FSDP2)."
            )


def _check_gathered(root: nn.Module, assignment: Assignment) -> None:
    """Raises if FSDP gathers the weights of a layer in another 16-bit format than it computes in."""
    modules = {id(node.module): node.name for node in walk(root)}
    for unit, module in _with_units(root, None):
        config = getattr(unit, "mixed_precision", None)
        gathered = config.param_dtype if config is not None else None
        name = modules.get(id(module))
        if gathered not in half_dtypes() or name is None or not module._parameters:
            continue
        if get_format(assignment[name].region).forward.dtype != gathered:
            raise PolicyError(
                f"FSDPStrategy(mixed_precision=...) gathers the weights of layer {name!r} in {format_of(gathered)}, "
                f"but it is to compute in {assignment[name].compute}; add its class to _module_classes_to_ignore, wrap "
                "it by itself with another MixedPrecision, or leave mixed_precision out."
            )


def _with_units(module: nn.Module, unit: Any) -> Iterator[tuple[Any, nn.Module]]:
    """Every module with the FSDP unit that gathers its weights."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    unit = module if isinstance(module, FullyShardedDataParallel) else unit
    yield unit, module
    for child in module.children():
        yield from _with_units(child, unit)
