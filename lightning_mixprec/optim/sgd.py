"""``SGD``: torch's, on weights and momentum in fewer bits."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lightning_mixprec.optim.kept_moments import Moment
from lightning_mixprec.optim.low_precision import LowPrecisionOptimizer
from lightning_mixprec.optim.narrow_steps import Widened


class SGD(LowPrecisionOptimizer, torch.optim.SGD):
    """SGD for weights stored in bf16 or fp16 that lose nothing, and momentum in 16 or 8 bits.

    The arithmetic is torch's in fp32, bit for bit: with weights and states in fp32 this is ``torch.optim.SGD``, and
    with ``weights="exact"`` a run is, given the same gradients, the same run on fp32 weights.

    Args:
        params: Parameters or groups; each group may have options of its own, ``weights`` and ``states`` among them.
        lr: The learning rate.
        momentum: The decay of the momentum; 0 for none.
        dampening: The part of a gradient that does not enter the momentum.
        weight_decay: The weights' part in the gradient.
        nesterov: Whether the momentum is Nesterov's.
        weights: As for :class:`~lightning_mixprec.optim.AdamW`.
        states: As for :class:`~lightning_mixprec.optim.AdamW`.
        maximize: As in torch.
        foreach: As in torch.
        differentiable: As in torch; only where weights and states are in fp32.
        fused: As in torch.
        seed: What rounding at random begins at; the same on every rank.
        grad_dtype: As for :class:`~lightning_mixprec.optim.AdamW`.

    Raises:
        SupportError: An option is none that there is; one line that says what is allowed.
    """

    _MOMENTS: ClassVar = (Moment("momentum_buffer", True),)
    _COUNTS_ALWAYS: ClassVar = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        weights: str = "exact",
        states: str = "fp32",
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        seed: int = 0,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        self._set_options(weights, states, seed, grad_dtype, **numbers)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _begins_at_zero(self, group: Mapping[str, Any]) -> bool:
        return bool(group["momentum"]) and not group["dampening"]

    def _moments_of(self, group: Mapping[str, Any]) -> list[Moment]:
        return list(self._MOMENTS if group["momentum"] else ())

    def _plain_step(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse = self._init_group(group, params, grads, buffers)  # type: ignore[no-untyped-call]
        self._update(group, params, grads, buffers, has_sparse, getattr(self, "found_inf", None))
        if group["momentum"]:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer

    def _wide_step(self, group: dict[str, Any], wide: Widened, is_first: list[bool], found_inf: Tensor | None) -> None:
        torch._foreach_add_(wide.steps, 1 if found_inf is None else 1 - found_inf)
        momenta = wide.moments.get("momentum_buffer", [])
        # Torch begins with the gradient itself, whatever the dampening.
        buffers: list[Tensor | None] = [None] * len(wide.params)
        for place, momentum in enumerate(momenta):
            buffers[place] = None if is_first[place] else momentum
        self._update(group, wide.params, wide.grads, buffers, False, found_inf)
        for momentum, buffer in zip(momenta, buffers, strict=False):
            if buffer is not momentum and buffer is not None:
                momentum.copy_(buffer)

    def _update(
        self,
        group: Mapping[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
        has_sparse_grad: bool,
        found_inf: Tensor | None,
    ) -> None:
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
