"""Odd layers and odd parameters: each trains under a mixed policy as in fp32, and watching changes nothing."""

from functools import partial

import pytest
import torch
from misuse_models import (
    FORMATS,
    around,
    check_healthy,
    check_unchanged_by_watching,
    every_format,
    inverse,
    mixed,
    seeded,
    watched,
)
from plugin_models import PLAIN_SGD, Task, fit, one_line, ours, overflowing, same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from lightning_mixprec import MixPrecError

EITHER_WAY = pytest.mark.parametrize(
    "policy", [form(format) for format in FORMATS for form in (mixed, inverse)], ids=str
)


def task(layer, optimizer=PLAIN_SGD):
    return lambda: Task(around(layer()), optimizer)


# Parameters


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@every_format
def test_a_rule_for_out_proj_of_an_attention_ends_the_run_in_one_line_before_it_begins(format):
    model = seeded(task(Attention))
    with pytest.raises(MixPrecError) as caught:
        watched(model, {"default": format, "net.1.attention.out_proj": "fp32"})
    assert one_line(caught).endswith("uses its weights directly; write the rule for net.1.attention")
    assert model.losses == []


@every_format
def test_the_rule_that_the_error_proposes_trains(format):
    check_healthy(task(Attention), {"default": format, "net.1.attention": "fp32"})


class Idle(nn.Module):
    """Of its parameters some are frozen, some are not used, and some are used without a gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.frozen, self.unused, self.detached = (nn.Linear(8, 8) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.alone = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.used(x) + self.frozen(x) + self.detached(x).detach()


@EITHER_WAY
def test_frozen_unused_and_gradient_less_parameters(policy):
    run = check_healthy(task(Idle), policy)
    first, last = seeded(task(Idle)).net[1], run.model.net[1]
    for name in ("frozen", "unused", "detached"):
        assert same(dict(getattr(first, name).state_dict()), dict(getattr(last, name).state_dict()))
    assert not torch.equal(first.used.weight, last.used.weight)


@every_format
def test_a_model_of_which_nothing_is_trained_is_lightnings_matter(format):
    def frozen():
        return Task(around(nn.Linear(8, 8)).requires_grad_(False))

    with pytest.raises(RuntimeError, match="does not require grad") as stock:
        fit(frozen())
    with pytest.raises(RuntimeError, match="does not require grad") as here:
        fit(frozen(), ours(mixed(format)))
    assert str(here.value) == str(stock.value)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 8, sparse=True)

    def forward(self, x):
        return x + self.table(x[:, 0].float().abs().mul(2).long().clamp(max=4))


@EITHER_WAY
def test_sparse_gradients(policy):
    check_healthy(task(Lookup), policy)


class Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64) / 3)

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs().to(x.dtype)


@EITHER_WAY
def test_complex_gradients(policy):
    run = check_healthy(task(Rotation), policy)
    assert run.model.net[1].weight.imag.abs().min() > 0


@pytest.mark.parametrize("kind", [Lookup, Rotation])
def test_sparse_and_complex_gradients_that_overflow_are_skipped(kind):
    run = watched(seeded(task(kind)), mixed("fp16"), callbacks=overflowing())
    assert run.plugin.skipped_steps == 1
    assert all(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all() for p in run.model.parameters())


# Weights that are made


@EITHER_WAY
def test_lazy_layers_are_sampled_once_they_are_there(policy):
    with pytest.warns(UserWarning, match=r"Monitor could not sample step 0 \(SupportError: .* a LazyLinear has lazy"):
        run = check_unchanged_by_watching(task(lambda: nn.LazyLinear(8)), policy)
    assert all("lazy" in problem for problem in run.problems)
    assert {row["step"] for row in run.rows if "problem" in row} == {0}
    assert [row["step"] for row in run.rows if row["monitor"] == "fidelity" and "loss_gap" in row] == [1, 2, 3]


def old_weight_norm():
    return weight_norm(nn.Linear(8, 8))


class Positive(nn.Module):
    def forward(self, x):
        return nn.functional.softplus(x)


def positive():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


MADE = {
    "old weight norm": old_weight_norm,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "old spectral norm": lambda: spectral_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "own parametrization": positive,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("policy", [mixed("fp16"), inverse("bf16")], ids=str)
def test_weight_norm_spectral_norm_and_parametrizations(kind, policy):
    check_healthy(task(MADE[kind]), policy)


# Buffers


class Counting(nn.Module):
    """Has a constant buffer of a rare kind beside one that every step changes."""

    def __init__(self, constant):
        super().__init__()
        self.register_buffer("constant", constant)
        self.register_buffer("calls", torch.zeros(()))
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.constant.to_dense().to(x.dtype).mean()


CONSTANTS = {
    "coo": lambda: torch.eye(8).to_sparse(),
    "csr": lambda: torch.eye(8).to_sparse_csr(),
    "csc": lambda: torch.eye(8).to_sparse_csc(),
    "bsr": lambda: torch.eye(8).to_sparse_bsr((2, 2)),
    "coo in bf16": lambda: torch.eye(8).bfloat16().to_sparse(),
    "expanded": lambda: torch.ones(1).expand(8),
}
SPARSE_IS_BETA = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")


@SPARSE_IS_BETA
@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("policy", [mixed("fp16"), inverse("fp64")], ids=str)
def test_buffers_that_kernels_cannot_write_to_outlive_a_skipped_step(kind, policy):
    make = task(lambda: Counting(CONSTANTS[kind]()))
    check_healthy(make, policy)
    run = watched(seeded(make), policy, callbacks=overflowing())
    constant = run.model.net[1].constant
    assert run.plugin.skipped_steps == 1
    assert run.model.net[1].calls == 3
    assert constant.dtype == CONSTANTS[kind]().dtype
    assert torch.equal(constant.to_dense(), CONSTANTS[kind]().to_dense())


class Gathering(nn.Module):
    """Adds to a sparse buffer in every step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(8, 8).to_sparse())

    def forward(self, x):
        self.seen = self.seen + torch.eye(8).to_sparse()
        return x


@every_format
def test_a_sparse_buffer_is_put_back_after_a_skipped_step(format):
    run = watched(seeded(task(Gathering)), mixed(format), callbacks=overflowing())
    assert run.plugin.skipped_steps == 1
    assert torch.equal(run.model.net[1].seen.to_dense(), 3 * torch.eye(8))


# Autocast of the user's own


class OwnAutocast(nn.Module):
    def __init__(self, hands_on=None, **arguments):
        super().__init__()
        self.inner, self.hands_on, self.arguments = nn.Linear(8, 8), hands_on, arguments

    def forward(self, x):
        with torch.autocast("cpu", **self.arguments):
            self.computed = self.inner(x if self.arguments.get("enabled", True) else x.float())
        return self.computed if self.hands_on is None else self.computed.to(self.hands_on)


@pytest.mark.parametrize(
    ("arguments", "computed"),
    [
        ({"enabled": False}, torch.float32),
        ({"dtype": torch.bfloat16, "hands_on": torch.float32}, torch.bfloat16),
        ({"dtype": torch.float16, "hands_on": torch.float32}, torch.float16),
    ],
    ids=["off", "bf16", "fp16"],
)
@EITHER_WAY
def test_autocast_inside_a_layer_wins_there_and_ends_there(arguments, computed, policy):
    run = check_unchanged_by_watching(task(partial(OwnAutocast, **arguments)), policy)
    assert run.problems == []
    assert run.model.net[1].computed.dtype == computed
    assert not torch.is_autocast_enabled("cpu")


@every_format
def test_a_layer_that_cannot_run_in_fp32_costs_one_warning_and_no_step(format):
    make = task(partial(OwnAutocast, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        fit(seeded(make))
    with pytest.warns(UserWarning, match=r"layer 'net\.2' cannot compute in fp32 \(RuntimeError: ") as said:
        run = check_unchanged_by_watching(make, {"default": format})
    assert sum("cannot compute" in str(warning.message) for warning in said) == 1
    assert not any("could not" in str(warning.message) for warning in said)
    assert run.trainer.global_step == 4
    assert run.plugin.history == []
