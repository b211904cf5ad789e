"""Arithmetic by layer: the floating-point operations of each layer's own matrix products in one training step.

Counted is what runs in forward, once: neither backward, which takes twice as much of nearly every layer, nor what
activation checkpointing computes again. A multiplication and an addition are two operations. Numbers follow from
shapes, so attention that is masked counts as if it were not; of sparse matrices, only the elements that they hold are
counted. Operations on strided nested tensors are not.

Matrix products are those of ``torch.matmul`` and its kin, convolution, attention, bilinear and recurrent layers. An
operation belongs to the innermost module whose forward runs; of a module that is called by another way than its
``__call__`` (as ``nn.MultiheadAttention`` uses its ``out_proj``), to the caller.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.flop_counter import flop_registry

from lightning_mixprec.evidence.instruments.current_layer import CurrentLayer

_aten = torch.ops.aten
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class FlopCount:
    """Counts while it is open; what runs in backward is left out.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    >>> with FlopCount({"": model, "0": model[0], "1": model[1]}) as count:
    ...     loss = model(torch.ones(3, 8)).sum()
    ...     loss.backward()
    >>> count.flops
    {'': 0, '0': 192, '1': 0}

    Args:
        layers: The modules of a model by name, as ``probe.layers_of`` gives them.

    Attributes:
        flops: Each layer's own floating-point operations.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.flops = dict.fromkeys(layers, 0)
        self._running = CurrentLayer(layers[""])
        self._counter = _Counter(self._add)

    def __enter__(self) -> "FlopCount":
        self._running.attach()
        self._counter.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._counter.__exit__(*exception)  # type: ignore[no-untyped-call]
        self._running.detach()

    def _add(self, flops: int) -> None:
        layer, _ = self._running.now()
        assert layer is not None
        self.flops[layer] += flops


class _Counter(TorchDispatchMode):
    """Sees the operations below autocast and autograd."""

    supports_higher_order_operators = True

    def __init__(self, add: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._add = add
        self._formulas = {**flop_registry, **_FORMULAS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a tensor subclass: what it does inside is counted
        if any(isinstance(each, Tensor) and each.is_nested for each in args):
            return func(*args, **kwargs)
        formula = self._formulas.get(getattr(func, "_overloadpacket", func))
        # What torch asks a fake tensor about itself, as its device, is no operation.
        if formula is None and isinstance(func, torch._ops.OpOverload) and func.namespace != "prim":
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if formula is not None and torch._C._current_graph_task_id() == -1:
            self._add(formula(*args, **kwargs, out_val=out))
        return out


def _product(a: Tensor, b: Tensor) -> int:
    """Matrices or vectors, or batches of them; of sparse ones what they hold."""
    columns = b.shape[-1] if b.dim() > 1 else 1
    return round(2 * a.numel() * columns * _density(a) * _density(b))


def _density(tensor: Tensor) -> float:
    if tensor.layout not in _SPARSE or not tensor.numel():
        return 1.0
    held = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    return held.numel() / tensor.numel()


def _of_two(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return _product(a, b)


def _added(added_to: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return _product(a, b)


def _grouped(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """Groups are parts of a dimension of one matrix or of both."""
    groups = a.shape[0] if a.dim() > b.dim() else 1
    return 2 * a.numel() * b.shape[-1] // groups


def _sampled(pattern: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * pattern.values().numel() * a.shape[-1]


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    new_a: Sequence[int],
    new_b: Sequence[int],
    new_c: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """The matrix product of all pairs of two inputs' elements with the weights."""
    shape: torch.Size = torch.broadcast_shapes(_with(a, new_a), _with(b, new_b), _with(c, new_c))
    return 2 * shape.numel()


def _with(tensor: Tensor, dimensions: Sequence[int]) -> list[int]:
    shape = list(tensor.shape)
    for dimension in dimensions:
        shape.insert(dimension, 1)
    return shape


def _recurrent(inputs: Tensor, weights: Sequence[Tensor]) -> int:
    """Every matrix is applied once at each time to each sequence; biases are vectors."""
    matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
    return 2 * inputs.numel() // inputs.shape[-1] * matrices if inputs.numel() else 0


def _cudnn_rnn(inputs: Tensor, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> int:
    return _recurrent(inputs, weights)


def _mkldnn_rnn(inputs: Tensor, weight: Tensor, recurrent_weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return _recurrent(inputs, (weight, recurrent_weight))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Every head of the queries; those of keys and values may be fewer."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    inner: Tensor,
    bias: Any,
    outer: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Self-attention in eval mode without gradients, fused with its projections."""
    batch, length, _ = query.shape
    return 2 * batch * length * (inner.numel() + outer.numel() + 2 * length * width)


_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mm: _of_two,
    _aten.mv: _of_two,
    _aten.dot: _of_two,
    _aten.vdot: _of_two,
    _aten._int_mm: _of_two,
    _aten._sparse_sparse_matmul: _of_two,
    _aten._sparse_mm_reduce_impl: _of_two,
    _aten.addmm: _added,
    _aten.addmm_: _added,
    _aten.addmv: _added,
    _aten.addmv_: _added,
    _aten.addbmm: _added,
    _aten.addbmm_: _added,
    _aten.baddbmm_: _added,
    _aten._addmm_activation: _added,
    _aten._sparse_addmm: _added,
    _aten._grouped_mm: _grouped,
    _aten.sparse_sampled_addmm: _sampled,
    _aten._trilinear: _trilinear,
    _aten._cudnn_rnn: _cudnn_rnn,
    _aten.miopen_rnn: _cudnn_rnn,
    _aten.mkldnn_rnn_layer: _mkldnn_rnn,
    _aten._native_multi_head_attention: _attention_layer,
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_cudnn_attention: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
}
