"""A step on a GPU that need not be there: its shapes and what it keeps, of fake tensors on ``cuda``, forward alone.

A fake tensor has a device, a shape and a dtype and no numbers; torch dispatches it as it would a real one, under CUDA's
own lists of what autocast casts. Backward cannot run on them where there is no GPU and may end the process, so it is
refused before torch sees it.
"""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.objects import mapped
from lightning_mixprec.errors import PlanError
from lightning_mixprec.evidence.instruments.current_layer import CurrentLayer
from lightning_mixprec.evidence.instruments.restoring.attributes import replaced
from lightning_mixprec.evidence.instruments.sandbox import sandbox
from lightning_mixprec.evidence.measuring.saved_by_layer import SavedByLayer
from lightning_mixprec.policy.policy import PrecisionPolicy

_CUDA = torch.device("cuda", 0)


class Launches(TorchDispatchMode):
    """Counts the operations that launch something, those that only look at memory otherwise left out.

    Args:
        model: The model whose step runs.

    Attributes:
        counts: By layer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._running = CurrentLayer(model)
        self.counts: dict[str, int] = {}

    def __enter__(self) -> "Launches":
        self._running.attach()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._running.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts it, if it is one of forward."""
        if torch._C._current_graph_task_id() == -1 and func.namespace == "aten" and not _is_view(func):
            layer = self._running.now()[0] or ""
            self.counts[layer] = self.counts.get(layer, 0) + 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """True for an operation whose result is the memory of an argument, unchanged."""
    returned = (each.alias_info for each in func._schema.returns)
    return any(alias is not None and not alias.is_write for alias in returned)


def trace(
    module: pl.LightningModule, batch: Any, policy: PrecisionPolicy, *seen: contextlib.AbstractContextManager[Any]
) -> None:
    """Runs the forward of a step under a policy on fake tensors, while something looks at it; nothing stays.

    Args:
        module: The module, wherever it is.
        batch: What its ``training_step`` takes.
        policy: The policy.
        seen: What looks at it, entered in this order.

    Raises:
        Exception: The step does what fake tensors cannot, or this torch has none on CUDA.
    """
    if not module.automatic_optimization:
        raise PlanError("its training_step runs backward itself")
    assignment = policy.resolve(module)
    step = _Step(module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sandbox(module, module.device))
        stack.enter_context(replaced(vars(module), _without_a_trainer()))
        attachment = attach(module, assignment, "cuda")
        stack.callback(attachment.detach)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device(_CUDA))
        own = {f"module.{name}": _fake(each) for name, each in (*module.named_parameters(), *module.named_buffers())}
        given = mapped(batch, _fake)
        stack.enter_context(_AsOnCuda())
        stack.enter_context(attachment.context())
        for each in seen:
            if isinstance(each, SavedByLayer):
                each.leave_out(own.values())
            stack.enter_context(each)
        torch.func.functional_call(step, own, (given,))


class _Step(nn.Module):
    """A module whose forward is another's training step."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        training_step: Any = self.module.training_step
        takes_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
        return training_step(batch, 0) if takes_index else training_step(batch)


def _fake(tensor: Tensor) -> Tensor:
    """A fake tensor on CUDA that is like another one."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_CUDA)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _without_a_trainer() -> Mapping[str, Any]:
    """Attributes of a LightningModule on CUDA that logs nothing."""
    return {"_device": _CUDA} | dict.fromkeys(("log", "log_dict", "print"), _nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _AsOnCuda(TorchFunctionMode):
    """Attention by CUDA's fused kernels, which fake tensors are not given by themselves; no backward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.autograd.grad, Tensor.backward, torch.autograd.backward):
            raise PlanError("its training_step runs backward itself")
        if func is F.scaled_dot_product_attention:
            return _attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention in 16 bits without a mask, else the memory-efficient one."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (each.to(dtype) if each.dtype == torch.float32 else each for each in (query, key, value))
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    result: Tensor
    with _autocast_off():
        if query.dtype.itemsize == 2 and attn_mask is None:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            result = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
            return result
        bias = None
        if attn_mask is not None:
            shape = (*query.shape[:-1], key.shape[-2])
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).expand(shape)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        result = efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
        return result


@contextlib.contextmanager
def _autocast_off() -> Generator[None, None, None]:
    was = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", was)
