"""The dtypes of layers' own numbers, against what autocast is known to do and gradients that were rounded by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from lightning_mixprec.evidence.instruments.own_dtypes import DtypeRecorder, OwnDtypes
from lightning_mixprec.evidence.instruments.probe import layers_of


class Scored(nn.Module):
    """Returns its loss beside what it computed, as models of other people's do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        logits = self.body(self.embed(tokens)) @ self.embed.weight.T
        return {"loss": F.cross_entropy(logits, tokens), "logits": logits}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Custom(nn.Module):
    """Computes in 16 bits by a function of its own, and hands on fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return Doubled.apply(x @ self.weight).float()


class Normed(nn.Module):
    """A norm that stays in fp32, whose output the next layer casts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.norm(x)
        return self.out(x)


def found_in(model: nn.Module, *inputs: torch.Tensor) -> OwnDtypes:
    own = OwnDtypes()
    with DtypeRecorder(layers_of(model), own), torch.autocast("cpu", torch.bfloat16):
        model(*inputs)
    return own


def test_a_loss_inside_the_network_is_fp32_and_what_it_is_computed_from_is_not():
    own = found_in(Scored(), torch.arange(8))
    assert own.outputs == {
        "": {0: torch.float32, 1: torch.bfloat16},
        "embed": {0: torch.bfloat16},  # as its reader casts it
        "body": {0: torch.bfloat16},
    }
    assert own.weights == {"embed": torch.bfloat16, "body": torch.bfloat16}  # a tied weight is used in both
    assert own.is_several("") and own.is_wider_than_others("", 0) and not own.is_wider_than_others("", 1)


def test_a_cast_at_the_end_hides_nothing_of_what_was_computed():
    own = found_in(Custom(), torch.ones(2, 4))
    assert own.outputs == {"": {0: torch.bfloat16}} and own.weights == {"": torch.bfloat16}


def test_weights_of_a_norm_in_fp32_have_fp32_gradients_though_its_output_is_cast():
    own = found_in(Normed(), torch.randn(2, 4))
    assert own.outputs["norm"] == {0: torch.bfloat16} and own.weights["norm"] == torch.float32


def test_what_needs_no_gradient_is_not_known():
    assert found_in(nn.Linear(4, 4).requires_grad_(False), torch.ones(2, 4)) == OwnDtypes()


def test_hooks_are_taken_off():
    model = Scored()
    found_in(model, torch.arange(8))
    assert not any(module._forward_hooks for module in model.modules())
