"""Fixtures for models with formats: attaching a policy for the length of a block, and comparing what a model was."""

import contextlib

import pytest
import torch
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.policy.policy import as_policy


@pytest.fixture
def attached():
    @contextlib.contextmanager
    def attached(model, policy, emulate=False):
        attachment = attach(model, as_policy(policy).resolve(model), "cpu", emulate)
        try:
            yield attachment
        finally:
            attachment.detach()

    return attached


def _plain(value):
    if isinstance(value, torch.Tensor):
        grad = None if not value.is_leaf or value.grad is None else value.grad.clone()
        return id(value), value.dtype, value.requires_grad, value.detach().clone(), grad
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else (id(value), type(value))


def _same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def snapshot():
    """Everything a module and those below it consist of, to be compared with ``==``."""

    class Snapshot:
        def __init__(self, model: nn.Module) -> None:
            self.parts = {
                name: {
                    **{key: _plain(value) for key, value in module.__dict__.items()},
                    "class": module.__class__,
                    "forward": module.forward if "forward" in module.__dict__ else None,
                }
                for name, module in model.named_modules(remove_duplicate=False)
            }

        def __eq__(self, other):
            return self.parts.keys() == other.parts.keys() and not self.differences(other)

        def differences(self, other):
            return [
                (name, key)
                for name, part in self.parts.items()
                for key in part.keys() | other.parts[name].keys()
                if not _same(part.get(key, "missing"), other.parts[name].get(key, "missing"))
            ]

    return Snapshot
