"""The functions of torch that multiply, and what computes each of them where products are emulated.

Those that autocast's lists have as ``lower_precision_fp``, as methods and as functions, those made of them, and those
that multiply what is in 16 bits already.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_mixprec.engine.backends import attention, contractions, convolutions, products, recurrent
from lightning_mixprec.engine.backends.replacing import Function

PRODUCTS: dict[Function, Callable[..., Any]] = {
    functional.linear: products.linear,
    torch.matmul: products.matmul,
    torch.linalg.matmul: products.matmul,
    Tensor.matmul: products.matmul,
    Tensor.__matmul__: products.matmul,
    Tensor.__rmatmul__: lambda self, other: products.matmul(other, self),
    torch.mm: products.mm,
    Tensor.mm: products.mm,
    torch.bmm: products.bmm,
    Tensor.bmm: products.bmm,
    torch.mv: products.mv,
    Tensor.mv: products.mv,
    torch.dot: products.dot,
    Tensor.dot: products.dot,
    torch.vdot: products.dot,
    Tensor.vdot: products.dot,
    torch.addmm: products.addmm,
    Tensor.addmm: products.addmm,
    torch.addmv: products.addmv,
    Tensor.addmv: products.addmv,
    torch.baddbmm: products.baddbmm,
    Tensor.baddbmm: products.baddbmm,
    torch.addbmm: products.addbmm,
    Tensor.addbmm: products.addbmm,
    torch.linalg.vecdot: products.vecdot,
    torch.bilinear: products.bilinear,
    torch.conv1d: convolutions.sliding(1),
    torch.conv2d: convolutions.sliding(2),
    torch.conv3d: convolutions.sliding(3),
    torch.conv_transpose1d: convolutions.transposed(1),
    torch.conv_transpose2d: convolutions.transposed(2),
    torch.conv_transpose3d: convolutions.transposed(3),
    functional.scaled_dot_product_attention: attention.scaled_dot_product_attention,
}
"""By function, what computes it with operands of one 16-bit dtype.

It takes the function's arguments, and returns NotImplemented for operands that it leaves to torch.
"""

NOT_CAST: dict[str, frozenset[Function]] = {
    "cpu": frozenset(
        (torch.mv, Tensor.mv, torch.addmv, Tensor.addmv, torch.dot, Tensor.dot, torch.vdot, Tensor.vdot, torch.bilinear)
    ),
    "cuda": frozenset((torch.dot, Tensor.dot, torch.vdot, Tensor.vdot, torch.bilinear)),
}
"""By device type, those of them whose operands autocast leaves as they are."""


def _unobserved(function: FunctionType) -> FunctionType:
    """A function of torch in Python that does not ask who replaces it, and so does its own work within.

    Such a function hands itself over before it calls others, which nobody would see then.
    """
    asking = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    own = {**function.__globals__, **dict.fromkeys(asking, _is_not_replaced)}
    copy = FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _is_not_replaced(*args: Any) -> bool:
    return False


_IN_PYTHON: list[Any] = [
    functional.multi_head_attention_forward,
    *filter(None, [getattr(functional, "linear_cross_entropy", None)]),
]

COMPOSITES: dict[Function, Callable[..., Any]] = {
    **{function: _unobserved(function) for function in _IN_PYTHON},
    torch.einsum: contractions.einsum,
    torch.tensordot: contractions.tensordot,
    torch.chain_matmul: lambda *matrices: contractions.multi_dot(matrices),
    torch.linalg.multi_dot: contractions.multi_dot,
    torch.inner: contractions.inner,
    Tensor.inner: contractions.inner,
    torch.conv_tbc: contractions.conv_tbc,
    torch.lstm: recurrent.lstm,
    torch.gru: recurrent.gru,
    torch.rnn_tanh: recurrent.rnn_tanh,
    torch.rnn_relu: recurrent.rnn_relu,
    torch.lstm_cell: recurrent.lstm_cell,
    torch.gru_cell: recurrent.gru_cell,
    torch.rnn_tanh_cell: recurrent.rnn_tanh_cell,
    torch.rnn_relu_cell: recurrent.rnn_relu_cell,
}
"""By function that is made of products, the same in functions that are replaced where it calls them."""

_RUNNING_BACKWARD: list[Any] = [Tensor.backward, torch.autograd.backward, torch.autograd.grad]

BACKWARD: dict[Function, Callable[..., Any]] = {function: _unobserved(function) for function in _RUNNING_BACKWARD}
"""Functions in which checkpointing computes anew what it did not keep, with products replaced as they were."""
