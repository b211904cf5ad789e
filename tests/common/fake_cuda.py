"""CUDA on a machine without it: fake tensors that are on ``cuda``, and what each layer computes of them in what dtype.

A fake tensor has a device and a dtype and no numbers. torch dispatches it as it would a real one, so that forward runs
under CUDA's own lists of what autocast casts. Backward cannot run: do not ask for one, it may end the process.
"""

import contextlib
from functools import cache, wraps
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def on_fake_cuda(device="cuda"):
    """Everything that is made within is fake, and on CUDA."""
    with FakeTensorMode(), torch.device(device):
        yield


@contextlib.contextmanager
def autocast(format, device="cuda"):
    """Autocast as torch.autocast sets it, which on a machine without CUDA sets nothing; none for a wide format."""
    was = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    _set(device, "16" in format, DTYPES[format] if "16" in format else was[1], False)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        _set(device, *was)


def _set(device, is_on, dtype, does_cache):
    torch.set_autocast_enabled(device, is_on)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(does_cache)


@cache
def lack():
    """Why this torch has no fake CUDA, or None where it has."""
    try:
        with on_fake_cuda(), autocast("bf16"), torch.no_grad():
            dtype = nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    except Exception as error:
        return f"torch {torch.__version__} makes no fake CUDA tensors: {str(error).splitlines()[0]}"
    return None if dtype == torch.bfloat16 else f"torch {torch.__version__} has no autocast of fake CUDA tensors"


needs_fake_cuda = pytest.mark.skipif(lack() is not None, reason=lack() or "fake CUDA is there")


class Call(NamedTuple):
    """An operation below autocast: the layer and the function that it runs in, and its floating tensors' dtypes."""

    layer: str
    function: str
    op: str
    inputs: tuple
    outputs: tuple


class HandedOn(NamedTuple):
    """What a layer took from its caller and returned to it: the dtypes of its floating tensors."""

    layer: str
    inputs: tuple
    outputs: tuple


class Recorder(TorchDispatchMode):
    """Records what the layers of a model compute, and what they hand on, in the order in which it happens.

    Casts at a layer's border belong to the layer, because they run within its ``forward``.
    """

    def __init__(self, model):
        super().__init__()
        self.seen = []
        self._functions = _Functions()
        self._names = {}
        for name, module in model.named_modules():
            self._names.setdefault(module, name)
        self._running = []

    @property
    def calls(self):
        return [each for each in self.seen if isinstance(each, Call)]

    @property
    def handed_on(self):
        return [each for each in self.seen if isinstance(each, HandedOn)]

    def __enter__(self):
        begin = nn.modules.module.register_module_forward_pre_hook(self._begin)
        end = nn.modules.module.register_module_forward_hook(self._end)
        self._handles = begin, end
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._functions.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _begin(self, module, args):
        self._running.append((self._names.get(module), _dtypes(args)))

    def _end(self, module, args, output):
        name, arrived = self._running.pop()
        if name is not None:
            self.seen.append(HandedOn(name, arrived, _dtypes(output)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        layer = next((name for name, _ in reversed(self._running) if name is not None), "")
        if (op := func.overloadpacket.__name__) not in ("device", "detach"):
            self.seen.append(Call(layer, self._functions.running, op, _dtypes((args, kwargs)), _dtypes(output)))
        return output


class _Functions(TorchFunctionMode):
    """Knows the function of torch that a layer has called."""

    running = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.running = getattr(func, "__name__", str(func))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running = ""


def _dtypes(value):
    tensors = [each for each in tree_leaves(value) if isinstance(each, torch.Tensor) and each.is_floating_point()]
    return tuple(each.dtype for each in tensors)


def recorded(model, inputs, context):
    """What a model does with inputs in a context."""
    with context, Recorder(model) as recorder:
        model(*inputs)
    return recorder


@contextlib.contextmanager
def cast_by_hand(model, assignment):
    """A model whose layers have forwards that cast as the contract says, written with torch's flags alone.

    The weights must be stored in fp32, and no layer may be called from two formats.

    Args:
        model: the model.
        assignment: by name of each module, what has ``compute`` and ``output``.
    """
    inner = [(name, module) for name, module in model.named_modules() if name and _has_forward(module)]
    for name, module in inner:
        caller = assignment[caller_of(name, model)].compute
        module.forward = _by_hand(module.forward, assignment[name], caller)
    try:
        with autocast(assignment[""].compute):
            yield
    finally:
        for _, module in inner:
            del module.forward


def _by_hand(forward, layer, caller):
    @wraps(forward)
    def call(*args, **kwargs):
        came = next((each for each in tree_leaves((args, kwargs)) if _is_floating(each)), None)
        if layer.compute != caller:
            args, kwargs = _into(layer.compute, (args, kwargs), caller)
            with autocast(layer.compute):
                result = forward(*args, **kwargs)
        else:
            result = forward(*args, **kwargs)
        output = DTYPES.get(layer.output)
        if layer.output == "input" and came is not None:
            output = came.dtype
        if output is not None:
            result = _cast(result, lambda _: output)
        came_from = layer.compute if output != torch.float64 else "fp64"
        return result if layer.compute == caller and output is None else _into(caller, result, came_from)

    return call


def _into(format, value, came_from):
    """Into a wide format everything goes; into 16 bits the other 16-bit format, and fp64 where it is the one around."""
    own = DTYPES[format]

    def target(dtype):
        if own.itemsize > 2 or dtype.itemsize == 2:
            return own
        return torch.float32 if dtype == torch.float64 and came_from == "fp64" else dtype

    return _cast(value, target)


def _cast(value, target):
    """A tensor that occurs twice is cast once, and stays one tensor."""
    done = {}

    def to(x):
        if not x.is_floating_point():
            return x
        if x not in done:
            done[x] = x.to(target(x.dtype))
        return done[x]

    return tree_map_only(torch.Tensor, to, value)


def _is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _has_forward(module):
    return type(module).forward is not nn.Module.forward


def caller_of(name, model):
    """The next module around one that has a forward."""
    while name:
        name = name.rpartition(".")[0]
        if _has_forward(model.get_submodule(name)):
            return name
    return ""
