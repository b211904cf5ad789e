"""Options, groups, hooks, copies and one-line errors of both optimizers."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from optimizer_runs import are_equal, begun, everything, gradients, take

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.optim import SGD, AdamW, fp32_state_dict

BOTH = [AdamW, SGD]
SHAPES = [(7, 5), (5000,)]


def test_the_public_names():
    import lightning_mixprec.optim

    assert sorted(lightning_mixprec.optim.__all__) == ["AdamW", "SGD", "fp32_state_dict", "full_weights"]


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_all_arguments_of_torchs_are_there_with_their_defaults(ours, theirs):
    """And are documented."""
    own, stock = (inspect.signature(each).parameters for each in (ours, theirs))
    assert {name: own[name].default for name in stock} == {name: value.default for name, value in stock.items()}
    assert set(own) - set(stock) == {"weights", "states", "seed", "grad_dtype"}
    assert all(f"{name}:" in ours.__doc__ for name in own)


def weight(dtype=torch.bfloat16):
    return torch.nn.Parameter(torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "precise"}, "weights is 'precise'; allowed are 'exact', 'kahan', 'stochastic', 'nearest'"),
        ({"states": "fp8"}, "states is 'fp8'; allowed are 'fp32', 'bf16', 'int8'"),
        ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"grad_dtype": torch.float64}, "grad_dtype is torch.float64; give torch.float32"),
        ({"lr": "1e-3"}, "lr is '1e-3' (str); it must be a number"),
        ({"lr": None}, "lr is None (NoneType); it must be a number"),
        ({"weight_decay": [0.1]}, "weight_decay is [0.1] (list); it must be a number"),
    ],
)
def test_an_option_that_is_none_is_one_line(optimizer_class, options, message):
    with pytest.raises(MixPrecError) as raised:
        optimizer_class([weight()], **options)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("betas", [None, 0.9, (0.9,), (0.9, 0.99, 0.999), (0.9, "0.999")])
def test_betas_are_two_numbers(betas):
    with pytest.raises(MixPrecError, match=r"^betas is .*; it must be two numbers, as in \(0.9, 0.999\)$"):
        AdamW([weight()], betas=betas)


@pytest.mark.parametrize("option", ["momentum", "dampening"])
def test_options_of_sgd_are_numbers(option):
    with pytest.raises(MixPrecError, match=f"^{option} is 'a' \\(str\\); it must be a number$"):
        SGD([weight()], **{option: "a"})


@pytest.mark.parametrize("given", [None, 3, "adamw", [None], [AdamW([weight()]), 3]])
def test_full_weights_need_a_module_and_its_optimizers(given):
    with pytest.raises(MixPrecError, match="^fp32_state_dict was given a Linear and a .*; give a module, and its opt"):
        fp32_state_dict(torch.nn.Linear(1, 1), given)
    with pytest.raises(MixPrecError, match="^fp32_state_dict was given a dict and a AdamW"):
        fp32_state_dict({}, AdamW([weight()]))


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_a_group_that_is_wrong_is_not_added(optimizer_class):
    optimizer = optimizer_class([weight()])
    with pytest.raises(MixPrecError, match="^weights is 'none'"):
        optimizer.add_param_group({"params": [weight()], "weights": "none"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_what_only_torchs_storage_takes_is_one_line(optimizer_class):
    table = torch.nn.Embedding(5, 3, sparse=True, dtype=torch.bfloat16)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(MixPrecError, match="sparse gradient.*Embedding\\(sparse=False\\)$"):
        SGD(table.parameters()).step()
    param = weight()
    optimizer = optimizer_class([param], differentiable=True)
    param.grad = torch.ones_like(param)
    with pytest.raises(MixPrecError, match="^differentiable=True needs weights and moments in fp32"):
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_groups_have_words_of_their_own(optimizer_class):
    optimizer = optimizer_class([{"params": [weight()]}, {"params": [weight()], "weights": "kahan"}], states="bf16")
    assert [group["weights"] for group in optimizer.param_groups] == ["exact", "kahan"]
    assert [group["states"] for group in optimizer.param_groups] == ["bf16", "bf16"]


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_as_the_original(optimizer_class, duplicate):
    params, optimizer = begun(optimizer_class, torch.bfloat16, SHAPES, lr=1e-2, weights="stochastic", states="bf16")
    take(optimizer, params, gradients(SHAPES, 2))
    other_params, other = duplicate((params, optimizer))
    for each, its in ((optimizer, params), (other, other_params)):
        take(each, its, gradients(SHAPES, 2, seed=8))
    assert are_equal(everything(params, optimizer), everything(other_params, other))
    other.add_param_group({"params": [weight()]})
    assert other.param_groups[-1]["weights"] == "stochastic"


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_a_closure_is_called_once_with_gradients_and_its_loss_is_returned(optimizer_class):
    param = weight()
    optimizer, calls = optimizer_class([param], lr=0.1), []

    def closure():
        calls.append(torch.is_grad_enabled())
        param.grad = None
        loss = param.float().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert calls == [True]
    assert (param < 1).all()


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_step_hooks_are_called(optimizer_class):
    param, calls = weight(), []
    optimizer = optimizer_class([param])
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_schedulers_move_the_rate_as_they_move_torchs(optimizer_class):
    theirs = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}[optimizer_class]
    ends = []
    for each, dtype in ((theirs, torch.float32), (optimizer_class, torch.bfloat16)):
        params, optimizer = begun(each, dtype, SHAPES, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        for grads in gradients(SHAPES, 8):
            take(optimizer, params, [grads])
            scheduler.step()
        ends.append(params if dtype == torch.float32 else full(params, optimizer))
    assert are_equal(*ends)


def full(params, optimizer):
    return list(fp32_state_dict(torch.nn.ParameterList(params), optimizer).values())


def test_parameters_that_are_added_later_begin_then():
    first, second = weight(), weight()
    optimizer = AdamW([first], lr=1e-2, weights="kahan")
    first.grad = torch.ones_like(first)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "weights": "exact"})
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert optimizer.state[first]["step"] == 2
    assert optimizer.state[second]["step"] == 1
    assert "remainder" in optimizer.state[second]


def test_a_weight_is_given_all_its_bits():
    param = weight()
    optimizer = AdamW([param], lr=0.0, weight_decay=0.0)
    wide = torch.tensor([1.0000001, -2.7182817, 3.1415927, 1e-30])
    optimizer.set_weight(param, wide)
    assert torch.equal(full([param], optimizer)[0], wide)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(full([param], optimizer)[0], wide)


def test_full_weights_share_nothing_and_leave_the_rest_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3).bfloat16())
    model[2].bias = torch.nn.Parameter(model[2].bias.detach().float())
    optimizers = [AdamW(model[0].parameters()), SGD(model[2].parameters())]
    wide = torch.randn(3, 3)
    optimizers[1].set_weight(model[2].weight, wide)
    weights = fp32_state_dict(model, optimizers)
    assert list(weights) == list(model.state_dict())
    assert torch.equal(weights["2.weight"], wide)
    assert weights["1.num_batches_tracked"].dtype == torch.int64
    for name, value in model.state_dict().items():
        if name != "2.weight":
            assert torch.equal(weights[name], value)
        assert weights[name].data_ptr() != value.data_ptr()
    torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)).load_state_dict(weights)


def test_full_weights_of_tied_weights_and_of_none_that_an_optimizer_has():
    first, second = torch.nn.Linear(3, 3).bfloat16(), torch.nn.Linear(3, 3).bfloat16()
    second.weight = first.weight
    model = torch.nn.Sequential(first, second, torch.nn.Linear(3, 3).bfloat16())
    optimizer = AdamW([first.weight])
    wide = torch.randn(3, 3)
    optimizer.set_weight(first.weight, wide)
    weights = fp32_state_dict(model, optimizer)
    assert torch.equal(weights["0.weight"], wide)
    assert torch.equal(weights["1.weight"], wide)
    assert torch.equal(weights["2.weight"], model[2].weight.float())


@pytest.mark.parametrize("optimizer_class", BOTH)
def test_a_state_is_read_by_weights_only(optimizer_class):
    params, optimizer = begun(optimizer_class, torch.bfloat16, SHAPES, grad_dtype=torch.float32)
    take(optimizer, params, [])
    for param in params:
        param.grad = torch.ones_like(param, dtype=torch.float32)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other_params, other = begun(optimizer_class, torch.bfloat16, SHAPES, grad_dtype=torch.float32)
    with torch.no_grad():
        for mine, param in zip(other_params, params, strict=True):
            mine.copy_(param)
    other.load_state_dict(loaded)
    assert are_equal(everything(other_params, other), everything(params, optimizer))
