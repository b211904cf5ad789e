"""Weights stored in one format and used in another, against casts by hand."""

import copy
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mixprec import PrecisionPolicy
from lightning_mixprec.engine.borders import border_of
from lightning_mixprec.engine.weights import seen_as

FORMATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_what_operations_see_is_never_narrower_than_what_they_compute_in():
    for stored in FORMATS.values():
        for compute in FORMATS.values():
            seen = seen_as(stored, compute)
            assert torch.finfo(seen).bits >= torch.finfo(compute).bits
            # A 16-bit format is seen only where it is both stored and computed in.
            assert seen in (torch.float32, torch.float64) or seen == stored == compute
    assert seen_as(torch.complex64, torch.float64) == torch.complex64


def computing(format, stored):
    """A policy under which layers compute in a format; those in fp64 weights do so only where a rule says it."""
    return {"default": format, "0": format} if stored == "fp64" != format else format


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("compute", FORMATS)
def test_every_stored_format_computes_in_every_format(stored, compute, attached):
    if stored == compute == "fp16":
        pytest.skip("stock fp16 layers on fp16 weights: nothing of ours runs")
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(FORMATS[stored])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = torch.randn(3, 4).to(FORMATS[compute] if compute == "fp64" else torch.float32)
    with attached(nn.Sequential(model), computing(compute, stored)) as attachment:
        with attachment.context():
            y = model(x if stored == compute == "fp64" or compute != stored else x.to(FORMATS[stored]))
        y.float().pow(2).sum().backward()
        assert {name: p.dtype for name, p in model.named_parameters()} == dict.fromkeys(before, FORMATS[stored])
    by_hand = {name: p.to(seen_as(p.dtype, FORMATS[compute])).requires_grad_() for name, p in before.items()}
    given = x if stored == compute == "fp64" or compute != stored else x.to(FORMATS[stored])
    with torch.autocast(
        "cpu", dtype=FORMATS[compute] if compute in ("bf16", "fp16") else None, enabled="16" in compute
    ):
        expected = torch.func.functional_call(model, by_hand, (given,))
    expected.float().pow(2).sum().backward()
    assert torch.equal(y.float(), expected.float())
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert torch.equal(parameter.grad, by_hand[name].grad.to(parameter.dtype)), name
        assert torch.equal(parameter, before[name])


def test_param_fp64_stores_wide_in_place_and_comes_back(attached, snapshot):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    identities = [id(p) for p in model.parameters()]
    before = snapshot(model)
    with attached(model, {"default": "fp32", "0": "p=fp64"}) as attachment:
        weight = model[0].weight
        assert weight.dtype == weight.grad.dtype == torch.float64 and model[1].weight.dtype == torch.float32
        assert isinstance(weight, nn.Parameter) and weight.requires_grad
        assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        with attachment.context():
            y = model(torch.ones(1, 2))
        assert y.dtype == torch.float32
        y.sum().backward()
        assert weight.grad.dtype == torch.float64
        model.zero_grad()
    assert [id(p) for p in model.parameters()] == identities
    model.zero_grad()
    after = snapshot(model)
    assert all(key == "_parameters" for _, key in after.differences(before))  # the gradients, zeroed above
    assert model[0].weight.dtype == torch.float32


def test_updates_too_small_for_fp32_accumulate_in_fp64_weights(attached):
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with attached(model, {"default": "fp32", "0": "p=fp64"}) as attachment:
        for _ in range(100):
            with attachment.context():
                model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model[0].weight.item() == pytest.approx(1 - 1e-7, abs=1e-12)


def test_param_fp32_widens_a_bf16_model(attached):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    with attached(model, {"default": "bf16", "0": "p=fp32"}) as attachment, attachment.context():
        assert model[0].weight.dtype == torch.float32 and model[1].weight.dtype == torch.bfloat16
        model(torch.ones(1, 2)).sum().backward()
    assert model[0].weight.dtype == torch.bfloat16


def test_tied_weights_are_stored_as_one_of_their_modules_says(attached):
    for order in ("ab", "ba"):
        model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in order})
        model["b"].weight = model["a"].weight
        with attached(model, {"default": "fp32", "a": "p=fp64"}):
            assert model["a"].weight.dtype == torch.float64
            assert model["b"](torch.ones(1, 2)).dtype == torch.float32
            assert model["b"].weight is model["a"].weight
        assert model["a"].weight.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_what_a_rule_stores_in_fp64_is_not_taken_for_fp64_by_nature_under_another_policy(tied, attached):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    if tied:
        model[2].weight = model[0].weight
    x, bf16 = torch.ones(3, 2), PrecisionPolicy("bf16")
    with attached(model, {"default": "bf16", "[01]": "p=fp64,c=fp64"}) as attachment:
        running = bf16.resolve(model)
        assert running.compute_formats == {"bf16"}
        attachment.change(running)
        with attachment.context():
            assert model[0](x).dtype == torch.bfloat16 and model[1](x).dtype == torch.float32
            assert model(x).dtype == torch.bfloat16
    assert [layer.param for layer in bf16.resolve(model).values()] == ["fp32"] * 4
    assert bf16.resolve(model.double()).compute_formats == {"fp64"}


def test_what_a_rule_stores_in_fp32_is_no_longer_left_in_fp64(attached):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)).double()
    model[1].weight = model[0].weight
    with attached(model, {"default": "bf16", "0": "p=fp32"}) as attachment, attachment.context():
        assert model(torch.ones(3, 2)).dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.float64


def test_no_bits_of_a_checkpoint_are_lost_that_was_loaded_before(attached):
    trained = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    for tensor in (*trained.parameters(), trained[1].running_mean):
        tensor.data.uniform_()
    state = trained.state_dict()
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.load_state_dict(state)
    with attached(model, {"default": "fp32", "0": "p=fp64", "1": "p=fp64,c=fp64"}) as attachment:
        assert not torch.equal(model[0].weight, state["0.weight"])
        attachment.restore_precise(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_has_changed_since_it_was_loaded_is_not_overwritten(attached):
    wide = torch.rand(2, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = {"0.weight": wide, "0.bias": torch.rand(3), "1.weight": wide, "other": 3}
    with attached(model, {"default": "fp32", "0": "p=fp64"}) as attachment:
        before = model[0].weight.clone()
        attachment.restore_precise(state)
        assert torch.equal(model[0].weight, before) and model[1].weight.dtype == torch.float32


def test_a_weight_seen_by_its_container_is_cast_for_it_too(attached):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, ids):
            return F.linear(self.embedding(ids) * self.scale, self.embedding.weight)

    model = nn.Sequential(Tied())
    ids = torch.tensor([1, 2])
    expected = model(ids)
    expected.sum().backward()
    grad = model[0].embedding.weight.grad.double()
    model.zero_grad()
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        y = model(ids)
        y.sum().backward()
        assert torch.equal(y, expected) and torch.allclose(model[0].embedding.weight.grad, grad)
    with attached(model, {"default": "bf16", "0": "p=fp64,c=fp64"}):
        y = model(ids)
        w = model[0].embedding.weight
        assert torch.equal(y, ((w[ids] * model[0].scale) @ w.t()).float())


def test_parameter_lists_belong_to_the_module_that_uses_them(attached):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([torch.ones(2, 2), torch.ones(2, 2)])

        def forward(self, x):
            return x @ self.weights[0] @ self.weights[1]

    model = nn.Sequential(Listed(), nn.Identity())
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        assert model[0].weights[0].dtype == torch.float64
        y = model(torch.ones(1, 2))
        y.sum().backward()
        assert y.dtype == torch.float32 and model[0].weights[1].grad.dtype == torch.float64


def test_an_exception_puts_the_stored_weights_back(attached):
    model = nn.Sequential(nn.Linear(2, 2))
    stored = model[0].weight
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 5))
        assert model[0].weight is stored and model[0]._parameters["weight"] is stored


def test_a_region_that_calls_itself_swaps_once(attached):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, depth=2):
            self.seen = self.linear.weight.dtype
            return self.linear(x) if not depth else self.linear(self(x, depth - 1))

    model = nn.Sequential(Deep())
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        model(torch.ones(1, 2)).sum().backward()
        assert model[0].seen == torch.float32 and model[0].linear.weight.dtype == torch.float64
        assert model[0].linear.weight.grad.dtype == torch.float64


def test_a_thread_does_not_take_the_weights_from_under_another(attached):
    """The first waits inside for the second, which then waits inside for the first to have left."""
    second_is_inside, first_has_left = threading.Event(), threading.Event()

    class Pausing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(2))

        def forward(self, x):
            if threading.current_thread().name == "first":
                second_is_inside.wait(0.5)
            elif threading.current_thread().name == "second":
                second_is_inside.set()
                first_has_left.wait(0.5)
            return x @ self.weight

    model = nn.Sequential(Pausing())
    x, results = torch.ones(1, 2), {}

    def work():
        name = threading.current_thread().name
        results[name] = model(x)
        if name == "first":
            first_has_left.set()

    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        expected = model(x)
        threads = [threading.Thread(target=work, name=name) for name in ("first", "second")]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert model[0].weight.dtype == torch.float64
    assert all(torch.equal(results[name], expected) for name in ("first", "second"))


@pytest.mark.parametrize("stored", ["fp64", "bf16"])
def test_batchnorm_statistics_are_kept_where_they_are_stored(stored, attached):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).to(FORMATS[stored])
    oracle = nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    with attached(nn.Sequential(model), computing("fp32", stored)):
        model(x)
        assert model[0].running_mean.dtype == FORMATS[stored]
    oracle(x)
    assert torch.equal(model[0].running_mean, oracle.running_mean.to(FORMATS[stored]))
    assert torch.equal(model[0].running_var, oracle.running_var.to(FORMATS[stored]))
    assert model[0].num_batches_tracked.item() == 1


def test_buffers_a_forward_leaves_alone_keep_their_bits(attached):
    model = nn.Sequential(nn.BatchNorm1d(3)).double().eval()
    model[0].running_mean.fill_(1 / 3)
    before = model[0].running_mean.clone()
    with attached(model, {"default": "fp32", "0": "fp32"}):
        model(torch.ones(2, 3))
        with torch.inference_mode():
            model(torch.ones(2, 3))
    assert torch.equal(model[0].running_mean, before)


def test_a_buffer_that_forward_rebinds_keeps_its_format(attached):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            self.mean = self.mean + x.mean()
            return x

    model = nn.Sequential(Counts())
    with attached(model, "fp32"):
        model(torch.ones(2))
    assert model[0].mean.item() == 1 and model[0].mean.dtype == torch.float64


def test_buffers_of_fp64_layers_are_stored_in_fp64_and_come_back(attached, snapshot):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = snapshot(model)
    running_mean = model[0].running_mean
    with attached(model, {"default": "fp32", "0": "fp64"}) as attachment:
        assert model[0].running_mean is running_mean and running_mean.dtype == torch.float64
        assert model[1].running_mean.dtype == torch.float32
        with attachment.context():
            model.eval()(torch.ones(2, 3))
        model.train()
    assert snapshot(model).differences(before) == []


def test_a_change_takes_buffers_along(attached):
    from lightning_mixprec.policy.policy import as_policy

    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with attached(model, {"default": "fp32", "0": "fp64"}) as attachment:
        attachment.change(as_policy({"default": "bf16", "1": "fp64"}).resolve(model))
        assert (model[0].running_mean.dtype, model[1].running_mean.dtype) == (torch.float32, torch.float64)
        model(torch.ones(4, 3))
    assert model[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("policy", [{"default": "fp32", "0": "p=fp64"}, {"default": "bf16", "0": "fp64"}])
def test_copies_of_a_model_with_swapped_weights_are_independent(policy, attached):
    model = nn.Sequential(nn.Linear(2, 2))
    with attached(model, policy):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.zero_()
            other[0].bias.zero_()
        assert other(torch.ones(1, 2)).tolist() == [[0, 0]] and model(torch.ones(1, 2)).any()
        assert border_of(other[0]).gate is not border_of(model[0]).gate


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_a_part_of_a_region_with_the_same_casts(use_reentrant, attached):
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))

        def forward(self, x):
            return checkpoint(self.block[1:], self.block[0](x), use_reentrant=use_reentrant)

    model = nn.Sequential(Net())
    oracle = copy.deepcopy(model)
    x = torch.randn(3, 2)
    oracle(x).sum().backward()
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        model(x).sum().backward()
        for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
            assert mine.grad.dtype == torch.float64 and torch.equal(mine.grad.float(), theirs.grad)


def test_a_recomputation_that_a_region_waits_for_does_not_hang(attached):
    """On CUDA backward runs in threads of its own, here one is started by hand."""
    from torch.utils.checkpoint import checkpoint

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            y = checkpoint(self.linear, x, use_reentrant=False).sum()
            thread = threading.Thread(target=y.backward, daemon=True)
            thread.start()
            thread.join(timeout=20)
            self.waited_in_vain = thread.is_alive()
            return y

    model = nn.Sequential(Penalised())
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        model(torch.ones(1, 2))
        assert not model[0].waited_in_vain
        assert model[0].linear.weight.grad.dtype == torch.float64 and model[0].linear.weight.dtype == torch.float64


class Decoder(nn.Module):
    """Calls a recurrent layer several times within its own region."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(4, 4, num_layers=2)

    def forward(self, x):
        for _ in range(3):
            x, _ = self.cell(x)
        return x


def put_together(module):
    """What cuDNN's layout does to the weights: the same numbers in one piece of memory."""
    whole = torch.cat([weight.detach().reshape(-1) for weight in module._flat_weights])
    with torch.no_grad():
        for weight, part in zip(
            module._flat_weights, whole.split([w.numel() for w in module._flat_weights]), strict=True
        ):
            weight.set_(part.view_as(weight))


@pytest.mark.parametrize("stored", ["bf16", "fp16"])
def test_torch_lays_out_the_seen_weights_of_a_recurrent_layer_for_cudnn(stored, attached, monkeypatch):
    """Loose ones cuDNN would copy at every call, with a warning; what it takes them for is put back afterwards."""
    noted = []

    def flatten_parameters(module):
        noted.append({weight.dtype for weight in module._flat_weights})
        if len(noted) > 3:  # in the second run
            put_together(module)

    model, x = Decoder().to(FORMATS[stored]), torch.randn(3, 2, 4)
    outcomes = []
    with attached(model, "fp32") as attachment:
        with monkeypatch.context() as patch:
            patch.setattr(nn.LSTM, "flatten_parameters", flatten_parameters)
            for _ in range(2):
                with attachment.context():
                    y = model(x)
                y.sum().backward()
                outcomes.append([y, *(parameter.grad.clone() for parameter in model.parameters())])
                model.zero_grad()
                assert [id(weight) for weight in model.cell._flat_weights] == list(map(id, model.cell.parameters()))
        assert not model.cell._weights_have_changed()
    assert noted == [{torch.float32}] * 6
    assert all(map(torch.equal, *outcomes))
