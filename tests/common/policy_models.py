"""The module that the tests of policies build their models from."""

from torch import nn


class Box(nn.Module):
    """A module with a forward and the children it is given."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return x
