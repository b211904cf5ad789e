"""Copies from one device to another: nothing is read on the host before it is there."""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_mixprec
from lightning_mixprec.numerics.flat_batches import flatten_together, moved_to, placed
from lightning_mixprec.optim.gradients import multiply_
from lightning_mixprec.optim.loss_scaling import LossScaler
from lightning_mixprec.optim.loss_scaling_options import LossScaling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Copies(TorchDispatchMode):
    """The copies between devices: to which, and whether the host goes on before the data are there."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device, kwargs = (kwargs or {}).get("device"), kwargs or {}
        if func is torch.ops.aten._to_copy.default and device is not None and device != args[0].device:
            self.seen.append((device.type, kwargs.get("non_blocking", False)))
        return func(*args, **kwargs)


def scaled(there, here):
    scaler = LossScaler(LossScaling())
    scaler.scale(torch.empty((), device=here))
    scaler.scale(torch.empty((), device=there))


MOVES = {
    "a comparison": lambda there, here: flatten_together(torch.empty(3, device=there), torch.empty(3, device=here)),
    "all rows": lambda there, here: placed(torch.empty(2, 3, device=here), [0, 1], torch.empty(2, 3, device=there)),
    "a loss": scaled,
    "a factor": lambda there, here: multiply_([torch.empty(3, device=there)], torch.empty((), device=here)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("there", "waits"), [(CPU, True), (CUDA, False)])
def test_the_host_waits_for_what_it_will_read_and_for_nothing_else(move, there, waits):
    with FakeTensorMode(), Copies() as copies:
        MOVES[move](there, CUDA if there == CPU else CPU)
    assert copies.seen == [(there.type, not waits)]


def calls_that_do_not_wait(path):
    """The functions of a file in which something is copied and not waited for."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if any(keyword.arg == "non_blocking" for keyword in call.keywords):
                yield f"{path.stem}.{function.name}"


def test_two_functions_alone_copy_without_waiting():
    """One of them waits towards the CPU, the other copies into pinned memory and records an event to wait for."""
    package = Path(lightning_mixprec.__file__).parent
    found = {name for path in package.rglob("*.py") for name in calls_that_do_not_wait(path)}
    assert found == {"flat_batches.moved_to", "transfer._to_host"}


@pytest.mark.gpu
def test_on_cuda_what_is_moved_to_the_host_is_there():
    value = torch.zeros(1000, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)
    value += 1
    assert moved_to(CPU, value, torch.float64).sum() == 1000
    torch.cuda._sleep(10**8)
    value += 1
    assert flatten_together(torch.zeros(1000), value)[1].sum() == 2000
