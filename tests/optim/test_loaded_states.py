"""States resumed in another storage: bit for bit where there is room, and one warning that says what is lost."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from optimizer_runs import are_equal, begun, everything, full_weights, gradients, take

from lightning_mixprec.optim import SGD, AdamW

SHAPES = [(7, 5), (5000,), ()]
KINDS = {
    "torch": (torch.optim.AdamW, torch.float32),
    "fp32": (AdamW, torch.float32),
    "bf16": (AdamW, torch.bfloat16),
    "fp16": (AdamW, torch.float16),
}
GRADS = [[grad.half().float() for grad in each] for each in gradients(SHAPES, 8)]


def saved(params, optimizer):
    """What a checkpoint has: weights as they are stored and the state, written to a file and read with weights_only."""
    file = io.BytesIO()
    torch.save(([param.detach() for param in params], optimizer.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(kind, checkpoint, **options):
    """An optimizer of a kind that goes on from a checkpoint, weights loaded first."""
    optimizer_class, dtype = KINDS[kind]
    params, optimizer = begun(optimizer_class, dtype, SHAPES, lr=1e-2, **options)
    weights, state = checkpoint
    with torch.no_grad():
        for param, weight in zip(params, weights, strict=True):
            param.copy_(weight)
    optimizer.load_state_dict(state)
    return params, optimizer


def weights_of(params, optimizer):
    if type(optimizer) is torch.optim.AdamW:
        return [param.detach() for param in params]
    return full_weights(params, optimizer)


@pytest.mark.parametrize(("first", "second"), [pair for pair in itertools.permutations(KINDS, 2) if pair[1] != "torch"])
def test_all_bits_of_weights_and_moments_go_over(first, second):
    """Half of the run in one storage and half in another is the run of torch's optimizer on fp32 weights."""
    reference, theirs = begun(torch.optim.AdamW, shapes=SHAPES, lr=1e-2)
    take(theirs, reference, GRADS)
    optimizer_class, dtype = KINDS[first]
    params, optimizer = begun(optimizer_class, dtype, SHAPES, lr=1e-2)
    take(optimizer, params, GRADS[:4])
    checkpoint = saved(params, optimizer)
    params, optimizer = resumed(second, checkpoint)
    if first in ("torch", "fp32") and second in ("bf16", "fp16"):
        # The plain copy of fp32 weights into 16 bits lost bits that no state has: as the plugin does, give them.
        for param, weight in zip(params, checkpoint[0], strict=True):
            optimizer.set_weight(param, weight)
    take(optimizer, params, GRADS[4:])
    assert are_equal(weights_of(params, optimizer), [param.detach() for param in reference])


def test_torchs_own_goes_on_from_an_exact_state():
    """Its weights are those of ``fp32_state_dict``."""
    reference, theirs = begun(torch.optim.AdamW, shapes=SHAPES, lr=1e-2)
    take(theirs, reference, GRADS)
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2)
    take(optimizer, params, GRADS[:4])
    _, state = saved(params, optimizer)
    stock, its = resumed("torch", (full_weights(params, optimizer), state))
    take(its, stock, GRADS[4:])
    assert are_equal([param.detach() for param in stock], [param.detach() for param in reference])
    back, ours = resumed("bf16", saved(stock, its))  # with the keys in it that torch's does not know
    assert set(ours.state[back[0]]) == {"step", "exp_avg", "exp_avg_sq", "remainder", "remainder_low"}


@pytest.mark.parametrize("weights", ["exact", "kahan", "stochastic", "nearest"])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_in_the_same_storage_the_rest_of_the_run_is_the_same(weights, states):
    options = {"weights": weights, "states": states}
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2, seed=3, **options)
    take(optimizer, params, GRADS[:4])
    other, its = resumed("bf16", saved(params, optimizer), **options)  # the seed is in the state
    assert are_equal(everything(other, its), everything(params, optimizer))
    for each, own in ((optimizer, params), (its, other)):
        take(each, own, GRADS[4:])
    assert are_equal(everything(other, its), everything(params, optimizer))


def test_compensated_weights_become_exact_ones():
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2, weights="kahan")
    take(optimizer, params, GRADS[:4])
    other, its = resumed("bf16", saved(params, optimizer), weights="exact")
    assert are_equal(full_weights(other, its), full_weights(params, optimizer))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("kahan", "weights, of which weights='kahan' keeps two numbers of the weight's own 16 bits"),
        ("stochastic", "weights, of which weights='stochastic' keeps the weight's own 16 bits"),
        ("nearest", "weights, of which weights='nearest' keeps the weight's own 16 bits"),
    ],
)
def test_weights_that_lose_bits_are_told_of_once(weights, message):
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2)
    take(optimizer, params, GRADS[:4])
    with pytest.warns(UserWarning, match="has more bits than are kept here") as told:
        resumed("bf16", saved(params, optimizer), weights=weights)
    assert [message in str(each.message) for each in told] == [True]
    assert "\n" not in str(told[0].message)


def test_moments_that_lose_bits_are_told_of_once_and_back_they_are_what_they_became():
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2)
    take(optimizer, params, GRADS[:4])
    with pytest.warns(UserWarning, match="exp_avg from 32 to 16 bits a number; exp_avg_sq from 32 to 16 bits") as told:
        narrow_params, narrow = resumed("bf16", saved(params, optimizer), states="bf16")
    assert len(told) == 1
    for param, its in zip(narrow_params, params, strict=True):
        assert torch.equal(narrow.state[param]["exp_avg"], optimizer.state[its]["exp_avg"].bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide_params, wide = resumed("bf16", saved(narrow_params, narrow))
    for param, its in zip(wide_params, narrow_params, strict=True):
        assert torch.equal(wide.state[param]["exp_avg"], narrow.state[its]["exp_avg"].float())


def test_moments_in_8_bits_become_those_they_stand_for():
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2, states="int8")
    take(optimizer, params, GRADS[:4])
    other, its = resumed("bf16", saved(params, optimizer))
    state = its.state[other[1]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "remainder", "remainder_low"}
    assert state["exp_avg"].dtype == torch.float32
    again, back = begun(AdamW, torch.bfloat16, SHAPES, states="int8")
    with pytest.warns(UserWarning, match="from 32 to 8 bits"):
        back.load_state_dict(copy.deepcopy(its.state_dict()))
    for key in ("exp_avg", "exp_avg_sq", "exp_avg_scales"):
        assert torch.equal(back.state[again[1]][key], optimizer.state[params[1]][key])


def test_momentum_goes_over_as_moments_do():
    reference, theirs = begun(torch.optim.SGD, shapes=SHAPES, lr=1e-2, momentum=0.9, dampening=0.2)
    take(theirs, reference, GRADS[:4])
    params, ours = begun(SGD, torch.bfloat16, SHAPES, lr=1e-2, momentum=0.9, dampening=0.2)
    ours.load_state_dict(theirs.state_dict())
    for param, its in zip(params, reference, strict=True):
        ours.set_weight(param, its.detach())
    for each, own in ((theirs, reference), (ours, params)):
        take(each, own, GRADS[4:])
    assert are_equal(full_weights(params, ours), [param.detach() for param in reference])


def test_what_is_configured_stays_as_it_is():
    """But for the seed, which the rest of a run needs."""
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, seed=7)
    take(optimizer, params, GRADS[:1])
    with pytest.warns(UserWarning, match="more bits"):
        _, its = resumed("bf16", saved(params, optimizer), weights="stochastic", states="bf16", seed=1)
    group = its.param_groups[0]
    assert (group["weights"], group["states"], group["seed"]) == ("stochastic", "bf16", 7)
    stock, theirs = begun(torch.optim.AdamW, shapes=SHAPES)
    take(theirs, stock, GRADS[:1])
    own, ours = begun(AdamW, torch.float32, SHAPES, seed=5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["seed"] == 5
    assert own
