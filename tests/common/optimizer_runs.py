"""Runs of optimizers on made-up gradients, the same for every storage, to be compared bit by bit."""

import torch

from lightning_mixprec.optim import fp32_state_dict

SHAPES = [(7, 5), (64,), (3, 4, 3), (), (5000,), (0, 3)]


def parameters(dtype=torch.float32, shapes=SHAPES, seed=1):
    """Parameters of a dtype, and the fp32 values that they are to begin with."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(value.to(dtype)) for value in values], values


def begun(optimizer_class, dtype=torch.float32, shapes=SHAPES, **options):
    """An optimizer of ours or torch's with its parameters, which begin at the same fp32 values in every dtype."""
    params, values = parameters(dtype, shapes)
    optimizer = optimizer_class(params, **options)
    if dtype != torch.float32 and hasattr(optimizer, "set_weight"):
        for param, value in zip(params, values, strict=True):
            optimizer.set_weight(param, value)
    return params, optimizer


def gradients(shapes, steps, seed=5):
    """For each step one gradient for each shape, which bf16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes] for _ in range(steps)]


def take(optimizer, params, grads, step=None):
    """Takes a step on each list of gradients."""
    for each in grads:
        for param, grad in zip(params, each, strict=True):
            param.grad = grad.to(param.dtype)
        (step or optimizer.step)()


def full_weights(params, optimizer):
    """The weights with all their bits."""
    model = torch.nn.Module()
    for number, param in enumerate(params):
        model.register_parameter(f"p{number}", param)
    return [value.clone() for value in fp32_state_dict(model, optimizer).values()]


def everything(params, optimizer):
    """Copies of all tensors that a step may change."""
    states = [optimizer.state.get(param, {}) for param in params]
    return [
        *(param.detach().clone() for param in params),
        *(value.clone() for state in states for _, value in sorted(state.items()) if isinstance(value, torch.Tensor)),
    ]


def are_equal(first, second):
    """True if lists of tensors are alike bit for bit, NaN and the sign of zero included."""
    return len(first) == len(second) and all(
        one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))
        for one, other in zip(first, second, strict=True)
    )


def _bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
