"""Snapshots: a run that was damaged and put back goes on as one that never was, to the last bit."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from plugin_models import Batches, Call, Task, fit, same, trainer
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW

from lightning_mixprec import PerLayerPrecision, optim
from lightning_mixprec.evidence import snapshot
from lightning_mixprec.evidence.snapshot import Snapshots

NAN = float("nan")
MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.05),
    "momentum": MOMENTUM,
    "fused sgd": partial(SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=0.01),
    "fused adam": partial(Adam, lr=0.01, fused=True),
    "tensor lr": partial(Adam, lr=torch.tensor(0.01), capturable=False, foreach=False),
    "amsgrad": partial(AdamW, lr=0.01, amsgrad=True),
    "adagrad": partial(Adagrad, lr=0.05),
    "lbfgs": partial(LBFGS, lr=0.1, max_iter=3, history_size=2),
}


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def state_of(run, model):
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    weights = [value.clone() for value in model.state_dict().values()]
    return weights, deepcopy(optimizers), run.precision_plugin.scaler.state_dict()


def spoil_weights(run, model):
    for param in model.parameters():
        param.data[0] = NAN


def spoil_statistics(run, model):
    model.net[1].running_var.fill_(float("inf"))
    model.net[1].running_mean[0] = NAN


def spoil_states(run, model):
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.fill_(NAN)
            state["invented"] = torch.ones(3)


def spoil_all(run, model):
    for spoil in (spoil_weights, spoil_statistics, spoil_states):
        spoil(run, model)


def wide_net():
    """Large enough for moments in 8 bits."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 700), nn.BatchNorm1d(700), nn.Tanh(), nn.Linear(700, 2))


def spoil_all_kinds(run, model):
    """As spoil_all, and integers, which hold no NaN."""
    spoil_weights(run, model)
    spoil_statistics(run, model)
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                value.fill_(NAN if value.is_floating_point() else 77)


def trained(make_optimizer, batches, *callbacks, policy="bf16", make=net, **options):
    model = Task(make(), make_optimizer)
    run = trainer(PerLayerPrecision(policy), callbacks=[*callbacks], **options)
    data = Batches(6, count=4)
    data.batches = [data.batches[number] for number in batches]
    states = Call("on_train_end", state_of)
    run.callbacks.append(states)
    run.fit(model, data)
    return states.results[0]


def rescued(make_optimizer, spoil, taken_at=1, **options):
    """Two batches, a copy, two more, damage, the copy written back, and the two batches again."""
    copy = Snapshots()
    take = Call("on_train_batch_end", lambda run, model: copy.take(run, model, run.global_step), at=taken_at)
    damage = Call("on_train_batch_end", spoil, at=3)
    restore = Call("on_train_batch_end", lambda run, model: copy.restore(), at=3)
    result = trained(make_optimizer, [0, 1, 2, 3, 2, 3], take, damage, restore, **options)
    assert take.results == [True]
    assert restore.results == [copy.step]
    return result


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_statistics, spoil_states, spoil_all])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_rescued_run_goes_on_as_one_that_was_never_damaged(make_optimizer, spoil):
    assert same(rescued(make_optimizer, spoil), trained(make_optimizer, range(4)))


@pytest.mark.parametrize("policy", ["fp16", "fp32", {"default": "bf16", "net.1": "p=fp64,c=fp64"}], ids=str)
def test_in_every_format(policy):
    assert same(rescued(MOMENTUM, spoil_all, policy=policy), trained(MOMENTUM, range(4), policy=policy))


@pytest.mark.filterwarnings("ignore:.* layers .* store their weights in 16 bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_stored_in_16_bits(dtype):
    options = {"make": lambda: net().to(dtype), "policy": "bf16" if dtype == torch.bfloat16 else "fp16"}
    adam = partial(Adam, lr=0.01, eps=1e-3)
    assert same(rescued(adam, spoil_all, **options), trained(adam, range(4), **options))


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("weights", ["exact", "kahan", "stochastic"])
@pytest.mark.parametrize("param", ["bf16", "fp16"])
def test_what_an_optimizer_keeps_of_weights_in_16_bits_comes_back(param, weights, states):
    """Remainders, compensation, masters, counters (which rounding at random is keyed by), moments and their scales."""
    options = {"policy": {"default": "fp32", "net.0": f"p={param}"}, "make": wide_net}
    ours = partial(optim.AdamW, lr=0.01, weights=weights, states=states)
    assert same(rescued(ours, spoil_all_kinds, **options), trained(ours, range(4), **options))


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_that_was_made_since_is_taken_away(make_optimizer):
    """A copy from before the first step has no moments yet, and those of later steps would be foreign to it."""
    copy = Snapshots()
    take = Call("on_train_start", lambda run, model: copy.take(run, model, 0))

    def restore(run, model):
        spoil_all(run, model)
        copy.restore()

    call = Call("on_train_batch_end", restore, at=1)
    assert same(trained(make_optimizer, [0, 1, 0, 1, 2], take, call), trained(make_optimizer, [0, 1, 2]))


def test_a_schedule_and_the_steps_go_on_where_they_are():
    class Scheduled(Task):
        def configure_optimizers(self):
            optimizer = Adam(self.parameters(), lr=0.1, betas=(0.8, 0.9))
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    copy = Snapshots()
    calls = [
        Call("on_train_start", lambda run, model: copy.take(run, model, 0)),
        Call("on_train_batch_end", lambda run, model: copy.restore(), at=2),
    ]
    run = fit(Scheduled(net()), PerLayerPrecision("bf16"), callbacks=calls)
    assert run.global_step == 4
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 16)


def test_numbers_that_an_optimizer_keeps_in_its_groups_come_back():
    class Counting(SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.param_groups[0].update(steps=0, estimate=torch.ones(()), name="weights")

        def step(self, closure=None):
            self.param_groups[0]["steps"] += 1
            self.param_groups[0]["estimate"].mul_(2)
            return super().step(closure)

    def spoil(run, model):
        run.optimizers[0].param_groups[0].update(steps=-1)
        run.optimizers[0].param_groups[0]["estimate"].fill_(NAN)

    assert same(rescued(Counting, spoil), trained(Counting, range(4)))


# What is kept


def during(look, module=None, plugin=None, at=1, make_optimizer=MOMENTUM, **options):
    """What a look at the run gives after a batch."""
    call = Call("on_train_batch_end", look, at=at)
    fit(Task(module or net(), make_optimizer), plugin or PerLayerPrecision("bf16"), callbacks=[call], **options)
    return call.results[0]


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_statistics, spoil_states])
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_finite_is_not_kept_and_the_last_copy_stays(spoil):
    def look(run, model):
        copy = Snapshots()
        assert copy.step is None
        assert copy.take(run, model, 7) and copy.damaged(model) == []
        before = state_of(run, model)
        spoil(run, model)
        taken = copy.take(run, model, 8)
        bad = copy.damaged(model)
        assert copy.step == copy.restore() == 7
        model_state, optimizers, scaler = state_of(run, model)
        assert same((model_state, scaler), (before[0], before[2]))
        return taken, bad, copy.damaged(model)

    names = {
        spoil_weights: [f"net.{layer}.{name}" for layer in (0, 1, 3) for name in ("weight", "bias")],
        spoil_statistics: ["net.1.running_mean", "net.1.running_var"],
        spoil_states: [],
    }
    assert during(look) == (False, names[spoil], [])


class Odd(nn.Module):
    """A net with every odd kind of tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 2)
        self.b.weight = self.a.weight
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.none = None
        buffers = {
            "count": torch.zeros((), dtype=torch.long),
            "flag": torch.tensor([True]),
            "wave": torch.ones(2, dtype=torch.complex64),
            "mask": torch.full((2, 2), float("-inf")).triu(1),
            "fp8": torch.ones(2).to(torch.float8_e4m3fn),
            "wide": torch.ones(3).expand(4, 3),
            "empty": torch.ones(0),
            "sparse": torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1), (3,), check_invariants=True),
            "absent": None,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=name != "count")

    def forward(self, x):
        return self.a(x) + self.b(x) + self.phase.abs()


def test_odd_tensors_come_back_in_place():
    def look(run, model):
        module, copy = model.net, Snapshots()
        assert copy.take(run, model, 1)
        expected = {name: value.clone() for name, value in module._buffers.items() if value is not None}
        weight, phase = module.a.weight.detach().clone(), module.phase.detach().clone()
        tensors = [*model.parameters(), *module._buffers.values()]
        with torch.no_grad():
            module.a.weight.fill_(NAN)
            module.phase.fill_(complex(0, NAN))
            module.count += 5
            module.flag.fill_(False)
            module.wave.fill_(complex(NAN, 0))
            module.fp8.copy_(torch.full((2,), NAN))
            module.sparse.mul_(NAN)
        module.mask = torch.zeros(3)
        module.absent = torch.ones(2)
        bad = copy.damaged(model)
        copy.restore()
        assert copy.damaged(model) == []
        assert torch.equal(module.a.weight, weight) and torch.equal(module.phase, phase)
        assert module.b.weight is module.a.weight
        for name, value in expected.items():
            now = module._buffers[name].to_dense().to(torch.complex128)
            assert torch.equal(now, value.to_dense().to(torch.complex128)), name
        assert module.absent is None
        mask = list(module._buffers).index("mask") + len(list(model.parameters()))
        now = [*model.parameters(), *module._buffers.values()]
        assert all(a is b for place, (a, b) in enumerate(zip(now, tensors, strict=True)) if place != mask)
        return sorted(bad)

    bad = during(look, Odd(), PerLayerPrecision("bf16", skip_nonfinite=False))
    assert bad == ["net.a.weight", "net.fp8", "net.phase", "net.sparse", "net.wave"]


class Unfinished(nn.Module):
    """Begins with a mask of -inf, with thresholds that are NaN until they are known, a frozen weight of NaN."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(6, 2), nn.Parameter(torch.full((2,), NAN), requires_grad=False)
        self.register_buffer("mask", torch.tensor([float("-inf"), 0.0]))
        self.register_buffer("low", torch.tensor([NAN, 1.0]))
        self.register_buffer("high", torch.tensor(NAN))

    def forward(self, x):
        return self.layer(x)


def test_what_a_model_begins_with_is_no_damage_and_what_changes_is():
    def look(run, model):
        net, copy, damaged = model.net[0], Snapshots(), []
        assert copy.take(run, model, 1)
        damaged.append(copy.damaged(model))
        net.high.fill_(3.0)
        damaged.append(copy.damaged(model))
        net.high.fill_(NAN)
        damaged.append(copy.damaged(model))
        with torch.no_grad():
            net.layer.weight[0, 0] = NAN
        damaged.append(copy.damaged(model))
        return damaged

    assert during(look, nn.Sequential(Unfinished())) == [
        [],
        [],
        ["net.0.high"],
        ["net.0.high", "net.0.layer.weight"],
    ]


def test_after_a_resume_what_the_copy_begins_with_is_no_damage_and_what_has_changed_since_is():
    def look(run, model):
        kept, resumed = Snapshots(), Snapshots()
        model.net[0].high.fill_(3.0)
        assert kept.take(run, model, 1)
        model.net[0].high.fill_(NAN)
        resumed.load_state_dict(run, model, kept.state_dict())
        return resumed.damaged(model)

    assert during(look, nn.Sequential(Unfinished())) == ["net.0.high"]


def test_objects_stay_and_the_memory_of_a_copy_is_used_again():
    def look(run, model):
        copy = Snapshots()
        copy.take(run, model, 1)
        memory = [tensor.data_ptr() for tensor in copy._storage]
        states = [value for state in run.optimizers[0].state.values() for value in state.values()]
        held = [*model.parameters(), *model.buffers(), *states]
        pointers = [tensor.data_ptr() for tensor in held]
        with torch.no_grad():
            model.net[0].weight.add_(1)
        copy.take(run, model, 2)
        assert sorted(tensor.data_ptr() for tensor in copy._storage) == sorted(memory)
        copy.restore()
        states = [value for state in run.optimizers[0].state.values() for value in state.values()]
        now = [*model.parameters(), *model.buffers(), *states]
        assert all(a is b for a, b in zip(held, now, strict=True))
        assert [tensor.data_ptr() for tensor in now] == pointers
        return len(memory)

    assert during(look, make_optimizer=OPTIMIZERS["adam"]) == 6 + 3 + 3 * 6


def test_a_copy_never_takes_more_than_it_may(monkeypatch):
    def look(run, model):
        needed = Snapshots.bytes_needed(run, model)
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [value for state in run.optimizers[0].state.values() for value in state.values()]
        assert needed == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        exact, small = Snapshots(needed), Snapshots(needed - 1)
        assert exact.take(run, model, 1)
        assert exact.take(run, model, 2)
        assert not small.take(run, model, 1) and small.step is None
        monkeypatch.setattr(snapshot, "free_host_bytes", lambda: 4 * needed - 1)
        assert not Snapshots().take(run, model, 1)
        monkeypatch.setattr(snapshot, "free_host_bytes", lambda: 4 * needed)
        assert Snapshots().take(run, model, 1)
        monkeypatch.setattr(snapshot, "free_host_bytes", lambda: 0)
        assert exact.take(run, model, 3), "its memory is its own"
        assert not Snapshots(2 * needed).take(run, model, 1)

    during(look)
    monkeypatch.undo()
    assert snapshot.free_host_bytes() > 2**20


def test_state_that_comes_later_has_to_fit_too():
    sizes = []

    def look(run, model):
        sizes.append(Snapshots.bytes_needed(run, model))
        return copy.take(run, model, run.global_step)

    copy = Snapshots()
    calls = [Call("on_train_start", look), Call("on_train_batch_end", look, at=0)]
    fit(Task(net(), Adam), PerLayerPrecision("bf16"), callbacks=calls)
    assert [call.results for call in calls] == [[True], [True]]
    weights = sum(param.numel() * 4 for param in net().parameters())
    assert sizes[1] - sizes[0] == 2 * weights + 6 * 4
    copy = Snapshots(sizes[0])
    calls = [Call("on_train_start", look), Call("on_train_batch_end", look, at=0)]
    fit(Task(net(), Adam), PerLayerPrecision("bf16"), callbacks=calls)
    assert [call.results for call in calls] == [[True], [False]]
    assert copy.step == 0


def test_the_loss_scale_comes_back_unless_nothing_was_scaled():
    def look(run, model):
        plugin, copy = run.precision_plugin, Snapshots()
        copy.take(run, model, 1)
        before = plugin.scaler.state_dict()
        if plugin.scaler.is_active:
            plugin.set_loss_scale(2)
        else:
            plugin.set_policy("fp16")
        copy.restore()
        return before, plugin.scaler.state_dict()

    before, after = during(look, plugin=PerLayerPrecision("fp16"))
    assert before == after and before["scale"] > 2
    before, after = during(look, plugin=PerLayerPrecision("bf16"))
    assert (before["scale"], after["scale"]) == (1, 65536)


# What is under way


def test_gradients_that_wait_for_their_step_are_dropped():
    """And so is what was found in them, or the coming step would be skipped, or the scale fall, on their account."""

    def restore(run, model):
        for param in model.parameters():
            param.grad.fill_(NAN)
        run.precision_plugin.scaler.unscale_(run.optimizers[0])
        copy.restore()
        return [param.grad for param in model.parameters()]

    copy = Snapshots()
    take = Call("on_train_start", lambda run, model: copy.take(run, model, 0))
    rescue = Call("on_train_batch_end", restore, at=0)
    plugin = PerLayerPrecision("fp16", loss_scaling={"init_scale": 1024})
    run = fit(Task(net(), MOMENTUM), plugin, callbacks=[take, rescue], accumulate_grad_batches=2)
    assert rescue.results == [[None] * 6]
    assert (plugin.skipped_steps, run.global_step, plugin.scaler.get_scale()) == (0, 2, 1024)


def test_a_step_that_is_skipped_afterwards_does_not_bring_damaged_buffers_back():
    class ByHand(Task):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss * (NAN if batch_idx == 2 else 1))
            optimizer.step()

    copy, seen = Snapshots(), []

    def restore(run, model):
        seen.append(model.net[1].running_mean.clone())
        copy.restore()

    calls = [
        Call("on_train_batch_end", lambda run, model: copy.take(run, model, 1), at=0),
        Call("on_train_batch_start", spoil_statistics, at=1),
        Call("on_train_batch_end", restore, at=1),
        Call("on_train_batch_end", lambda run, model: seen.append(model.net[1].running_mean.clone()), at=2),
    ]
    model = ByHand(net(), MOMENTUM)
    fit(model, PerLayerPrecision("bf16"), callbacks=calls)
    assert not seen[0].isfinite().all()
    assert seen[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_on_cuda_the_copy_is_on_the_device_or_on_the_host(on_host, fused, monkeypatch):
    if on_host:
        monkeypatch.setattr(snapshot, "free_cuda_bytes", lambda device: 0)
    make = partial(AdamW, lr=0.01, fused=fused)
    options = {"accelerator": "gpu", "policy": "fp16"}
    assert same(rescued(make, spoil_all, **options), trained(make, range(4), **options))
