"""``diagnose`` says by hand what the monitor says in a run, without a Trainer and without a trace."""

import copy

import pytest
import torch
from known_results import INF, stock
from lightnings import CSVLogger
from monitor_models import CULPRITS, FACTOR, Gain, Planted, Watched, batches, mlp, watch
from plugin_models import one_line, same, snapshot
from torch import nn

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision, PrecisionPolicy, diagnose
from lightning_mixprec.evidence import saved_batches as saved_module

DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "backward"])


def accused(event):
    return event["verdict"], event["layer"], event["direction"]


@DIRECTIONS
@pytest.mark.parametrize("name", CULPRITS)
def test_it_says_what_the_monitor_says(name, direction):
    model = Watched(CULPRITS[name][0](direction))
    (event,) = watch(copy.deepcopy(model)).events
    by_hand = diagnose(model, batches()[0])
    frames = by_hand.pop("frames")
    assert by_hand == {key: value for key, value in event.items() if key not in ("step", "epoch")}
    assert any(frame["infs"] and frame["layer"] == CULPRITS[name][1] for frame in frames)


def test_a_finite_step_has_no_verdict():
    found = diagnose(Watched(mlp(None)), batches()[0], loss_scale=1024)
    assert (accused(found), found["loss_scale"], found["frames"]) == ((None, None, None), 1024, [])
    assert found["message"] == "the step is finite"


VERDICTS = {
    "scale": (Watched(mlp("backward"), weight=1.0), batches()[0], ("scale", None, None)),
    "data": (Watched(mlp(None)), batches()[0] * INF, ("data", None, None)),
    "model": (Watched(nn.Sequential(nn.Linear(8, 8), Gain(INF))), batches()[0], ("model", "net.1", "forward")),
}


@pytest.mark.parametrize(("model", "batch", "expected"), VERDICTS.values(), ids=VERDICTS)
def test_it_tells_the_verdicts_apart(model, batch, expected):
    assert accused(diagnose(model, batch)) == expected


@pytest.mark.parametrize(
    ("policy", "verdict"),
    [
        ("bf16", None),
        ("fp32", None),
        ({"default": "fp16"}, "precision"),
        ({"default": "bf16", "net.2.spike": "fp16"}, "precision"),
        (PrecisionPolicy.from_dict({"default": "fp32", "net.0": "fp16"}), None),
        ("policy.yaml", "precision"),
    ],
    ids=str,
)
def test_it_takes_any_policy(policy, verdict):
    PrecisionPolicy.from_dict({"default": "fp16", "net.5": "fp32"}).to_file("policy.yaml")
    assert diagnose(Watched(mlp("forward")), batches()[0] * 4, policy)["verdict"] == verdict


def test_without_a_layer_in_fp16_nothing_is_scaled():
    assert diagnose(Watched(mlp("backward")), batches()[0], "bf16", loss_scale=2.0**100)["loss_scale"] == 1.0


@pytest.mark.parametrize("policy", ["fp16", "fp32"])
@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_the_module_changes(policy, train):
    model = Watched(CULPRITS["resnet"][0]("forward")).train(train)
    model.net.requires_grad_(False)
    model.other(batches()[0]).sum().backward()
    before, state, random = snapshot(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    grads = [param.grad.clone() for param in model.other.parameters()]
    diagnose(model, batches()[0], policy)
    assert same(snapshot(model), before)
    assert same(dict(model.state_dict()), dict(state))
    assert same([param.grad for param in model.other.parameters()], grads)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_batch_is_not_written_to():
    class Writes(Watched):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.pop("x").mul_(2), batch_idx)

    batch = {"x": batches()[0]}
    diagnose(Writes(mlp("forward")), batch)
    assert torch.equal(batch["x"], batches()[0])


class ByHand(Watched):
    def __init__(self, direction):
        super().__init__(nn.Linear(8, 8))
        self.automatic_optimization = False
        self.bad = nn.Sequential(nn.Linear(8, 8), Planted(direction), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        with first.toggle_model():
            first.zero_grad()
            self.manual_backward(self.net(batch).float().square().mean())
            first.step()
        self.toggle_optimizer(second)
        second.optimizer.zero_grad()
        loss = self.bad(batch).float().square().mean() + self.weight * self.other(batch).float().sum()
        self.manual_backward(loss)
        self.clip_gradients(second, 1.0)
        second.step()
        self.untoggle_optimizer(second)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        second = torch.optim.Adam([*self.bad.parameters(), *self.other.parameters()])
        schedule = torch.optim.lr_scheduler.StepLR(second, 1)
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), second], [schedule]


@DIRECTIONS
def test_manual_optimization_is_run_with_optimizers_that_do_not_step(direction):
    model = ByHand(direction)
    state = copy.deepcopy(model.state_dict())
    assert accused(diagnose(model, batches()[0])) == ("precision", "bad.1.spike", direction)
    assert same(dict(model.state_dict()), dict(state))
    assert all(param.requires_grad and param.grad is None for param in model.parameters())


class NeedsATrainer(Watched):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / self.trainer.num_training_batches


class Counts(Watched):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0.5**self.global_step


class Raises(Watched):
    def training_step(self, batch, batch_idx):
        raise KeyError("labels\nof the batch")


def test_a_step_that_asks_for_its_trainer_is_refused_in_one_line():
    with pytest.raises(MixPrecError) as caught:
        diagnose(NeedsATrainer(mlp(None)), batches()[0])
    assert "training_step asks for its Trainer" in one_line(caught)
    assert "OverflowMonitor" in one_line(caught)


def test_the_step_counters_of_a_module_without_a_trainer_are_zero_as_lightning_says():
    assert accused(diagnose(Counts(mlp("forward")), batches()[0])) == ("precision", "net.2.spike", "forward")


def test_logging_and_printing_need_no_trainer(capsys):
    class Talks(Watched):
        def training_step(self, batch, batch_idx):
            self.log_dict({"a": 1.0, "b": 2.0})
            self.print("hello")
            return super().training_step(batch, batch_idx)

    assert diagnose(Talks(mlp("forward")), batches()[0])["layer"] == "net.2.spike"
    assert capsys.readouterr().out == ""


class Indexless(Watched):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Indexed(Watched):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch * (INF if batch_idx == 3 else 1.0), batch_idx)


def test_the_index_of_the_batch_is_handed_on():
    assert diagnose(Indexless(mlp("forward")), batches()[0])["layer"] == "net.2.spike"
    assert diagnose(Indexed(mlp(None)), batches()[0])["verdict"] is None
    found = diagnose(Indexed(mlp(None)), batches()[0], batch_idx=3)
    assert (found["verdict"], found["batch_idx"]) == ("model", 3)


BAD = {
    "no module": (lambda: diagnose(nn.Linear(2, 2), batches()[0]), "diagnose() got a Linear"),
    "no file": (lambda: diagnose(Watched(mlp(None)), "nowhere.pt"), "'nowhere.pt' cannot be read as a saved batch"),
    "no such format": (lambda: diagnose(Watched(mlp(None)), batches()[0], "fp17"), "fp17"),
    "no such layer": (
        lambda: diagnose(Watched(mlp(None)), batches()[0], {"default": "fp16", "net.nine": "fp32"}),
        "net.nine",
    ),
    "scale": (lambda: diagnose(Watched(mlp(None)), batches()[0], loss_scale=0), "loss_scale is 0"),
    "nan": (lambda: diagnose(Watched(mlp(None)), batches()[0], loss_scale=float("nan")), "loss_scale is nan"),
    "bool": (lambda: diagnose(Watched(mlp(None)), batches()[0], loss_scale=True), "loss_scale is True"),
    "index": (lambda: diagnose(Watched(mlp(None)), batches()[0], batch_idx="1"), "batch_idx is '1'"),
    "raises": (lambda: diagnose(Raises(mlp(None)), batches()[0]), "the step could not be run: KeyError"),
    "wrong batch": (lambda: diagnose(Watched(mlp(None)), torch.ones(4, 3)), "the step could not be run: RuntimeError"),
}


@pytest.mark.parametrize(("call", "said"), BAD.values(), ids=BAD)
def test_whatever_is_wrong_is_said_in_one_line(call, said):
    with pytest.raises(MixPrecError) as caught:
        call()
    assert said in one_line(caught)


class Chancy(Watched):
    """Overflows in the batches in which dropout leaves something of the first feature."""

    def training_step(self, batch, batch_idx):
        return super().training_step({key: value for key, value in batch.items() if key == "x"}["x"], batch_idx)


def chancy():
    return Chancy(nn.Sequential(nn.Dropout(0.9), nn.Linear(8, 8, bias=False), Gain(2.0**18), Gain(2.0**-18)))


def saved_run(tmp_path, model, values, plugin=None, **options):
    logger = CSVLogger(tmp_path, name="run", version=0)
    return watch(model, plugin, values, monitor=OverflowMonitor(save_batch=True), logger=logger, **options)


@pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])
def test_a_saved_batch_reproduces_its_event_dropout_included(tmp_path, make_plugin):
    values = [{"x": x[:1] * 0.25, "name": ["a"]} for x in batches(12)]
    model = chancy()
    seen = saved_run(tmp_path, model, values, make_plugin(), max_steps=12)
    events = [event for event in seen.events if event["verdict"] == "precision"]
    assert 0 < len(events) < 12
    outcomes = set()
    for event in events:
        path = f"{seen.trainer.log_dir}/overflow-step{event['step']}-batch{event['batch_idx']}.pt"
        torch.manual_seed(event["batch_idx"])
        again = diagnose(model, path)
        assert (accused(again), again["op"], again["batch_idx"]) == (accused(event), event["op"], event["batch_idx"])
        assert again["loss_scale"] == event["loss_scale"]
        # Other random numbers make another outcome of the same batch likely.
        outcomes |= {diagnose(model, values[event["batch_idx"]])["verdict"] for _ in range(4)}
    assert len(outcomes) > 1
    assert len(seen.warned) == 1
    first = f"{seen.trainer.log_dir}/overflow-step{events[0]['step']}-batch{events[0]['batch_idx']}.pt"
    assert seen.warned[0].endswith(f" Replay it with lightning_mixprec.diagnose(model, {first!r}).")


def test_a_saved_batch_knows_the_policy_it_failed_under(tmp_path):
    gains = [Gain(FACTOR), Gain(1 / FACTOR)]
    model = Watched(nn.Sequential(nn.Linear(8, 8), *gains, nn.Linear(8, 8), *copy.deepcopy(gains)))
    policy = {"default": "fp16", "net.1": "c=bf16,o=fp32"}
    seen = saved_run(tmp_path, model, batches(), PerLayerPrecision(policy, loss_scaling=2048))
    path = f"{seen.trainer.log_dir}/overflow-step0-batch0.pt"
    assert accused(diagnose(model, path)) == accused(seen.events[0]) == ("precision", "net.4", "forward")
    assert diagnose(model, path)["loss_scale"] == 2048
    assert diagnose(model, path, "bf16")["verdict"] is None
    wholly = diagnose(model, path, PrecisionPolicy("fp16"), loss_scale=8)
    assert (accused(wholly), wholly["loss_scale"]) == (("precision", "net.1", "forward"), 8)


def test_no_file_is_written_for_the_search_for_a_scale(tmp_path):
    seen = saved_run(tmp_path, Watched(mlp("backward"), weight=1.0), batches())
    assert [event["verdict"] for event in seen.events] == ["scale"]
    assert not list(tmp_path.rglob("*.pt"))


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("not here")

    monkeypatch.setattr(saved_module.torch, "save", refuse)
    seen = saved_run(tmp_path, Watched(mlp("forward")), batches(1))
    assert len(seen.events) == 1
    refused, told = seen.warned
    assert "overflow-step0-batch0.pt (PermissionError: not here)" in refused
    assert "Replay" not in told
    assert not list(tmp_path.rglob("*.p*t*"))


def test_a_batch_of_a_class_of_its_own_says_how_to_replay_it(tmp_path):
    batch = Own(batches()[0])
    model = TakesOwn(mlp("forward"))
    seen = saved_run(tmp_path, model, [batch])
    path = f"{seen.trainer.log_dir}/overflow-step0-batch0.pt"
    with pytest.raises(MixPrecError) as caught:
        diagnose(model, path)
    assert "torch.load(path, weights_only=False)['batch']" in one_line(caught)
    assert accused(diagnose(model, torch.load(path, weights_only=False)["batch"])) == accused(seen.events[0])


class Own:
    def __init__(self, x):
        self.x = x

    def to(self, *args, **kwargs):
        return self


class TakesOwn(Watched):
    def training_step(self, batch, batch_idx):
        return self.net(batch.x).float().square().mean()


def test_a_class_of_ones_own_is_saved_and_a_run_goes_on(tmp_path):
    seen = saved_run(tmp_path, TakesOwn(mlp("forward")), [Own(x) for x in batches(2)])
    assert seen.skipped_steps == 2
