"""``AdamW``: torch's, on weights and moments in fewer bits."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from lightning_mixprec.optim.kept_moments import Moment
from lightning_mixprec.optim.low_precision import LowPrecisionOptimizer
from lightning_mixprec.optim.narrow_steps import Widened


class AdamW(LowPrecisionOptimizer, torch.optim.AdamW):
    """AdamW for weights stored in bf16 or fp16 that lose nothing, and moments in 16 or 8 bits.

    The arithmetic is torch's in fp32, bit for bit: with weights and states in fp32 this is ``torch.optim.AdamW``, and
    with ``weights="exact"`` a run is, given the same gradients, the same run on fp32 weights.

    Args:
        params: Parameters or groups; each group may have options of its own, ``weights`` and ``states`` among them.
        lr: The learning rate.
        betas: The decay of the first and the second moment.
        eps: What is added to the root of the second moment.
        weight_decay: The decay of weights, apart from the gradient.
        weights: What keeps the bits that a weight stored in 16 bits cannot hold: ``"exact"`` (all of them),
            ``"kahan"``, ``"stochastic"`` or ``"nearest"`` (none). Weights in fp32 and fp64 follow torch.
        states: What moments are stored in: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        amsgrad: As in torch.
        maximize: As in torch.
        foreach: As in torch.
        capturable: As in torch.
        differentiable: As in torch; only where weights and states are in fp32.
        fused: As in torch.
        seed: What rounding at random begins at; the same on every rank.
        grad_dtype: ``torch.float32`` to accumulate gradients of weights in 16 bits in fp32 (2 bytes more a weight).

    Raises:
        SupportError: An option is none that there is; one line that says what is allowed.

    >>> weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    >>> optimizer = AdamW([weight], lr=2e-4, weight_decay=0.0)
    >>> for _ in range(100):
    ...     weight.grad = torch.ones_like(weight)
    ...     optimizer.step()
    >>> weight  # torch's AdamW leaves them at 1
    Parameter containing:
    tensor([0.9805, 0.9805, 0.9805], dtype=torch.bfloat16, requires_grad=True)
    """

    _MOMENTS: ClassVar = (Moment("exp_avg", True), Moment("exp_avg_sq", False), Moment("max_exp_avg_sq", False))

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        weights: str = "exact",
        states: str = "fp32",
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        seed: int = 0,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._set_options(weights, states, seed, grad_dtype, **numbers)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def _moments_of(self, group: Mapping[str, Any]) -> list[Moment]:
        return list(self._MOMENTS if group["amsgrad"] else self._MOMENTS[:2])

    def _plain_step(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        averages: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        steps: list[Tensor] = []
        has_complex = self._init_group(  # type: ignore[no-untyped-call]
            group, params, grads, *averages, steps
        )
        self._update(group, params, grads, averages, steps, has_complex, getattr(self, "found_inf", None))

    def _wide_step(self, group: dict[str, Any], wide: Widened, is_first: list[bool], found_inf: Tensor | None) -> None:
        first, second, largest = (wide.moments.get(moment.name, []) for moment in self._MOMENTS)
        self._update(group, wide.params, wide.grads, (first, second, largest), wide.steps, False, found_inf)

    def _update(
        self,
        group: Mapping[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        averages: tuple[list[Tensor], list[Tensor], list[Tensor]],
        steps: list[Tensor],
        has_complex: bool,
        found_inf: Tensor | None,
    ) -> None:
        adam(
            params,
            grads,
            *averages,
            steps,
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
            has_complex=has_complex,
            decoupled_weight_decay=True,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
