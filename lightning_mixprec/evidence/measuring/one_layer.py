"""A layer that is called once more inside a step, in another format, without a trace in the step."""

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import replace

import torch
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.backends import Emulate
from lightning_mixprec.engine.border_plan import Site
from lightning_mixprec.policy.assignment import EightBits, LayerPrecision
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.policy.rules import is_of_products


@contextlib.contextmanager
def in_format(
    site: Site, format: str, base: Mapping[str, LayerPrecision], device: torch.device, emulate: Emulate = "auto"
) -> Generator[None, None, None]:
    """A site's own operations compute in a format; the layers inside it compute in fp32.

    Args:
        site: The site.
        format: The format.
        base: What each layer is assigned in fp32, by its name in the whole model.
        device: The device that it runs on.
        emulate: As for :func:`~lightning_mixprec.engine.apply.attach`.
    """
    own = {id(part) for part in site.parts}
    prefix = f"{site.name}." if site.name else ""
    assignment = {}
    for node in walk(site.module):
        layer = base[f"{prefix}{node.name}" if node.name else site.name]
        assignment[node.name] = narrowed(layer, format) if id(node.module) in own else layer
    attachment = attach(site.module, assignment, device.type, emulate)
    try:
        with attachment.context():
            yield
    finally:
        attachment.detach()


def narrowed(layer: LayerPrecision, format: str) -> LayerPrecision:
    """What a layer is assigned if it computes in a format, in the manner that is usual for it."""
    is_of_bits = is_of_products(format)
    return replace(layer, compute=format, eight_bits=EightBits.usual(format) if is_of_bits else layer.eight_bits)


@contextlib.contextmanager
def unchanged(layer: nn.Module) -> Generator[None, None, None]:
    """The buffers and attributes of a layer's modules are put back, so that a call more leaves the step as it is."""
    attributes = [(module, dict(vars(module))) for module in layer.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        for module, before in attributes:
            now = vars(module)
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
        with torch.no_grad():
            for buffer, version, kept in buffers:
                if buffer._version != version:
                    buffer.copy_(kept)
