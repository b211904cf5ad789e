"""Attention of 16-bit tensors: torch's fused kernel in fp32 where it takes them, else products and a softmax.

Either way queries, keys, values and the result are in 16 bits. The fused kernel keeps probabilities in fp32 inside, and
saves what autocast's saves: operands, result, and the logarithm of each row's sum.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

from lightning_mixprec.engine.backends.products import applied, is_in_forward_mode, opaque, product, without_autocast

_NAME = "_scaled_dot_product_flash_attention_for_cpu"
_FUSED = "Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale"


@opaque(f"{_NAME}({_FUSED}) -> (Tensor, Tensor)")
def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), k.float(), v.float(), 0.0, causal, attn_mask=_wide(mask), scale=scale
        )
        return result.to(q.dtype), sums


@opaque(f"{_NAME}_backward(Tensor grad, Tensor result, Tensor sums, {_FUSED}) -> (Tensor, Tensor, Tensor)")
def _fused_gradients(grad: Tensor, result: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    mask, causal, scale = rest
    with without_autocast(q):
        operands = [tensor.float() for tensor in (grad, q, k, v, result)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *operands, sums, 0.0, causal, attn_mask=_wide(mask), scale=scale
        )
        return tuple(gradient.to(q.dtype) for gradient in found)


def _wide(mask: Tensor | None) -> Tensor | None:
    """A mask as numbers that are added: torch's fused kernel takes no others."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


class FusedAttention(torch.autograd.Function):
    """Attention by torch's fused kernel for the CPU, which has no second derivative, here as in torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Any:
        """The result, and the logarithms of sums that backward needs."""
        return _fused(q, k, v, mask, causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what the fused kernel keeps."""
        q, k, v, mask, ctx.causal, ctx.scale = inputs
        result, sums = output
        ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(q, k, v, mask, result, sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        """The gradients of queries, keys and values."""
        q, k, v, mask, result, sums = ctx.saved_tensors
        found = _fused_gradients(grad, result, sums, q, k, v, mask, ctx.causal, ctx.scale)
        return *found, None, None, None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``torch.nn.functional.scaled_dot_product_attention`` of 16-bit tensors; torch has the errors for its masks."""
    is_mask = attn_mask is None or (not is_causal and attn_mask.dim() >= 2)
    if not is_mask:
        return NotImplemented
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if _takes(query, key, value, attn_mask, dropout_p, is_causal):
        return applied(FusedAttention, query, key, value, attn_mask, is_causal, scale)[0]
    with without_autocast(query):
        return _by_products(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> bool:
    """True if torch's fused kernel takes these operands, and nobody switched it off; compiled code cannot ask that.

    It has no derivative in forward mode.
    """
    return (
        query.device.type == "cpu"
        and not is_in_forward_mode()
        and (is_compiling() or torch.backends.cuda.flash_sdp_enabled())
        and dropout == 0
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and 0 not in (*query.shape, *key.shape)
        and (mask is None or (not causal and mask.dim() in (2, 4) and not mask.requires_grad))
    )


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Any:
    leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query, key, value = (tensor.expand(*leading, *tensor.shape[-2:]) for tensor in (query, key, value))
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    added = mask if mask is not None and mask.dtype != torch.bool else None
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = product(query, key.mT, added, alpha=factor)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    probabilities = torch.ops.aten._safe_softmax(scores, -1)
    return product(functional.dropout(probabilities, dropout) if dropout else probabilities, value)
