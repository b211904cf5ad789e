"""What one of two processes does in test_optimizers.py: steps on sharded weights; saves what came out of it whole."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optimizer_runs import gradients
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.optim import AdamW, fp32_state_dict

SHAPES = [(7, 5), (64,), (1, 9), (6, 11)]
PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}
OPTIONS = [("exact", "fp32"), ("exact", "bf16"), ("kahan", "bf16"), ("stochastic", "bf16"), ("nearest", "fp32")]


class Weights(torch.nn.Module):
    """Weights alone, spread as asked; what has one dimension always by it."""

    def __init__(self, mesh=None, placements=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number, shape in enumerate(SHAPES):
            value = torch.randn(shape, generator=generator).bfloat16()
            if mesh is not None:
                value = spread(value, mesh, placements)
            self.register_parameter(f"p{number}", torch.nn.Parameter(value))


def spread(value, mesh, placements):
    return distribute_tensor(value, mesh, [Shard(0)] if value.ndim == 1 and placements == [Shard(1)] else placements)


def take(model, optimizer, grads, mesh=None, placements=None):
    for each in grads:
        for param, grad in zip(model.parameters(), each, strict=True):
            grad = grad.bfloat16()
            param.grad = grad if mesh is None else spread(grad, mesh, placements)
        optimizer.step()


def whole(model, optimizer):
    """All tensors, of DTensors the whole ones."""
    states = [value for param in model.parameters() for _, value in sorted(optimizer.state[param].items())]
    everything = [*model.state_dict().values(), *states, *fp32_state_dict(model, optimizer).values()]
    return [(each.full_tensor() if isinstance(each, DTensor) else each).detach().clone() for each in everything]


def resumed(model, optimizer, mesh, placements, folder, weights, states):
    """From a distributed checkpoint, into a fresh optimizer, and a step further."""
    dcp.save({"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    other = Weights(mesh, placements)
    its = AdamW(other.parameters(), lr=1e-2, weights=weights, states=states)
    take(other, its, gradients(SHAPES, 1, seed=9), mesh, placements)
    loaded = {"model": other.state_dict(), "optim": get_optimizer_state_dict(other, its)}
    dcp.load(loaded, checkpoint_id=folder)
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, its, loaded["optim"])
    return other, its


def main(folder):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for weights, states in OPTIONS:
        model = Weights()
        optimizer = AdamW(model.parameters(), lr=1e-2, weights=weights, states=states)
        take(model, optimizer, gradients(SHAPES, 4))
        results[weights, states, "one"] = whole(model, optimizer)
        for name, placements in PLACEMENTS.items():
            model = Weights(mesh, placements)
            optimizer = AdamW(model.parameters(), lr=1e-2, weights=weights, states=states)
            take(model, optimizer, gradients(SHAPES, 3), mesh, placements)
            if name == "rows":
                place = folder / f"{weights} {states}"
                model, optimizer = resumed(model, optimizer, mesh, placements, place, weights, states)
            take(model, optimizer, gradients(SHAPES, 4)[3:], mesh, placements)
            results[weights, states, name] = whole(model, optimizer)
    try:
        AdamW(Weights(mesh, PLACEMENTS["rows"]).parameters(), states="int8")
    except MixPrecError as error:
        results["int8"] = str(error)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
