"""A resumed run is the run that was interrupted; what is done when another policy is configured."""

import pytest
import torch
from capabilities import auto_format
from plugin_models import (
    MOMENTUM,
    Batches,
    Call,
    Evaluable,
    Task,
    fit,
    moved,
    one_line,
    ours,
    overflowing,
    probes,
    resume,
    same,
    save,
    task,
    trainer,
)
from torch import nn

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy

MIXED = {"default": "fp16", "net.6": "fp32"}
POLICY = PrecisionPolicy.from_dict(MIXED)


# Going on


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", MIXED], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(policy):
    whole = task()
    fit(whole, ours(policy), max_epochs=2)
    fit(task(), ours(policy), callbacks=[save()])
    model, _ = resume(ours(policy))
    assert same(model.losses, whole.losses[4:])
    assert same([*model.state_dict().values()], [*whole.state_dict().values()])


def test_moves_made_during_the_run_are_resumed_with_their_history():
    plugin = ours(MIXED)
    moved(plugin)
    again = ours(MIXED)
    formats = Call("on_train_batch_end", lambda run, model: again.assignment["net.4"].compute)
    resume(again, callbacks=[formats])
    assert formats.results == ["bf16"] * 4
    assert again.history == plugin.history
    assert again.policy == plugin.policy


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("policy", ["auto", "fp16"])
@pytest.mark.parametrize("on_policy_change", ["raise", "accept"])
def test_a_plugin_that_goes_back_to_a_checkpoint_takes_back_the_moves_made_since(policy, on_policy_change):
    plugin = ours(policy, on_policy_change=on_policy_change)
    early = Call("on_train_batch_end", lambda run, model: run.save_checkpoint("run.ckpt"), at=0)
    move = Call("on_train_batch_end", lambda run, model: plugin.edit_policy({"net.4": "fp32"}), at=1)
    fit(task(), plugin, callbacks=[early, move])
    assert plugin.assignment["net.4"].compute == "fp32"
    resume(plugin)
    assert plugin.history == []
    assert plugin.policy.rules == ()
    assert plugin.assignment["net.4"].compute == plugin.assignment[""].compute


def test_a_resumed_run_with_moves_is_bit_for_bit_the_uninterrupted_one():
    def move():
        return Call("on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({"net.4": "bf16"}), at=1)

    whole, plugin = task(), ours(MIXED)
    fit(whole, plugin, max_epochs=2, callbacks=[move()])
    fit(task(), ours(MIXED), callbacks=[move(), save()])
    again = ours(MIXED)
    model, _ = resume(again)
    assert same(model.losses, whole.losses[4:])
    assert same([*model.state_dict().values()], [*whole.state_dict().values()])
    assert again.history == plugin.history
    assert again.state_dict() == plugin.state_dict()


@pytest.mark.parametrize("twice", [1, 2])
def test_a_run_can_be_resumed_again_and_again(twice):
    plugin = ours(MIXED)
    moved(plugin)
    for epoch in range(2, 2 + twice):
        again = ours(MIXED)
        resume(again, max_epochs=epoch, callbacks=[save()])
        assert again.history == plugin.history
        assert again.policy == plugin.policy


def test_auto_resumes_as_auto():
    fit(task(), PerLayerPrecision("auto"), callbacks=[save()])
    _, run = resume(PerLayerPrecision("auto"))
    assert run.precision_plugin.policy == PrecisionPolicy(auto_format())


def test_the_same_policy_in_another_form_is_no_change():
    fit(task(), ours(MIXED), callbacks=[save()])
    POLICY.to_file("policy.yaml")
    for form in (POLICY, "policy.yaml", POLICY.to_dict()):
        plugin = PerLayerPrecision(form, loss_scaling={"init_scale": 1024})
        resume(plugin)
        assert plugin.history == []


def test_skipped_steps_are_counted_on():
    fit(task(), ours(MIXED), callbacks=[*overflowing(), save()])
    plugin = ours(MIXED)
    _, run = resume(plugin, callbacks=overflowing())
    assert plugin.skipped_steps == 2
    assert plugin.scaler.get_scale() == 256
    assert run.global_step == 6


class Resumable(Batches):
    """Goes on where it was."""

    position = 0

    def __iter__(self):
        for place in range(self.position % len(self), len(self)):
            self.position = place + 1
            yield self.batches[place]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_checkpoint_in_the_middle_of_an_epoch(accumulate):
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    whole = task()
    fit(whole, ours(MIXED), **options)
    at = Call("on_train_batch_end", lambda run, model: run.save_checkpoint("run.ckpt"), at=2)
    fit(task(), ours(MIXED), Resumable(6), callbacks=[at], accumulate_grad_batches=accumulate)
    model = task()
    run = trainer(ours(MIXED), **options)
    run.fit(model, Resumable(6), ckpt_path="run.ckpt")
    assert run.global_step == (8 if accumulate == 1 else 4)
    assert same(model.losses, whole.losses[3:])
    assert same([*model.state_dict().values()], [*whole.state_dict().values()])


# Another configured policy

OTHER = {"default": "bf16", "net.6": "fp32", "net.1": "fp32"}


def test_another_configured_policy_is_an_error_that_shows_the_difference():
    moved(ours(MIXED))
    plugin = PerLayerPrecision(OTHER)
    with pytest.raises(MixPrecError) as caught:
        resume(plugin)
    message = str(caught.value)
    assert "\n" not in message
    assert "default fp16 -> bf16" in message
    assert "net.1" in message
    assert "net.6" not in message
    assert "'accept'" in message
    assert "'checkpoint'" in message


@pytest.mark.parametrize(
    ("was", "now"), [("auto", "bf16"), ("bf16", "auto"), ("bf16", "fp32"), ("auto", MIXED)], ids=str
)
def test_the_difference_names_short_forms_as_they_were_written(was, now):
    fit(task(), ours(was), callbacks=[save()])
    with pytest.raises(MixPrecError) as caught:
        resume(PerLayerPrecision(now))
    message = str(caught.value)
    assert "\n" not in message
    for form in (was, now):
        assert (
            "auto" if form == "auto" else "fp32" if form == "fp32" else "bf16" if form == "bf16" else "fp16"
        ) in message


def test_accept_goes_on_with_the_policy_configured_now():
    first = ours(MIXED)
    moved(first)
    plugin = PerLayerPrecision(OTHER, on_policy_change="accept")
    formats = Call(
        "on_train_batch_end", lambda run, model: [plugin.assignment[f"net.{i}"].compute for i in (0, 1, 4, 6)]
    )
    resume(plugin, callbacks=[formats])
    assert formats.results == [["bf16", "fp32", "bf16", "fp32"]] * 4
    assert plugin.policy == PrecisionPolicy.from_dict(OTHER)
    assert plugin.history[: len(first.history)] == first.history
    accepted = plugin.history[len(first.history) :]
    assert {entry["step"] for entry in accepted} == {4}
    changes = {entry["layer"]: (entry["from"], entry["to"]) for entry in accepted}
    assert changes[""] == ("fp16", "bf16")
    assert changes["net.1"] == ("fp16", "fp32")
    assert "net.4" not in changes
    assert "net.6" not in changes
    assert plugin.scaler.get_scale() == 1


def test_after_accept_the_new_policy_is_the_configured_one():
    moved(ours(MIXED))
    resume(PerLayerPrecision(OTHER, on_policy_change="accept"), callbacks=[save("second.ckpt")])
    third = PerLayerPrecision(OTHER)
    resume(third, "second.ckpt", max_epochs=3)
    assert third.policy == PrecisionPolicy.from_dict(OTHER)


def test_checkpoint_goes_on_with_the_policy_of_the_checkpoint():
    first = ours(MIXED)
    moved(first)
    plugin = PerLayerPrecision(OTHER, on_policy_change="checkpoint", loss_scaling={"init_scale": 4096})
    formats = Call(
        "on_train_batch_end", lambda run, model: [plugin.assignment[f"net.{i}"].compute for i in (0, 1, 4, 6)]
    )
    resume(plugin, callbacks=[formats, save("second.ckpt")])
    assert formats.results == [["fp16", "fp16", "bf16", "fp32"]] * 4
    assert plugin.policy == first.policy
    assert plugin.history == first.history
    assert plugin.scaler.get_scale() == 1024
    third = ours(MIXED)
    resume(third, "second.ckpt", max_epochs=3)
    assert third.history == first.history


def test_checkpoint_takes_an_unmoved_policy_too():
    fit(task(), ours(MIXED), callbacks=[save()])
    plugin = PerLayerPrecision("fp32", on_policy_change="checkpoint")
    resume(plugin)
    assert plugin.policy == POLICY
    assert plugin.history == []


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
@pytest.mark.parametrize("on_policy_change", ["raise", "accept", "checkpoint"])
def test_evaluating_a_checkpoint_under_another_policy_never_raises(entry, on_policy_change):
    move = Call("on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({"net.4": "bf16"}), at=1)
    run = trainer(ours(MIXED), callbacks=[move, save()])
    run.fit(task(Evaluable), Batches(6), Batches(6))
    plugin = PerLayerPrecision(OTHER, on_policy_change=on_policy_change)
    getattr(trainer(plugin), entry)(task(Evaluable), Batches(6), ckpt_path="run.ckpt")
    assert plugin.policy == PrecisionPolicy.from_dict(OTHER)
    assert plugin.history == []
    assert plugin.skipped_steps == 0


def test_evaluating_uses_the_moved_policy_of_a_checkpoint_under_the_same_configuration():
    move = Call("on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({"net.2": "bf16"}), at=1)
    policy = {"default": "fp16", "net.0": "fp32"}
    run = trainer(ours(policy), callbacks=[move, save()])
    run.fit(Evaluable(probes(), MOMENTUM), Batches(6), Batches(6))
    model = Evaluable(probes(), MOMENTUM)
    trainer(ours(policy)).validate(model, Batches(6), ckpt_path="run.ckpt", verbose=False)
    assert [probe.computed for probe in model.net] == [{torch.float32}, {torch.float16}, {torch.bfloat16}]


def test_accept_goes_on_although_the_old_policy_does_not_fit_the_model_any_more():
    model = Task(nn.Sequential(nn.Linear(6, 2), nn.Identity()), MOMENTUM)
    fit(model, PerLayerPrecision({"default": "bf16", "net.1": "fp32"}), callbacks=[save()])
    changed = Task(nn.Sequential(nn.Linear(6, 2)), MOMENTUM)
    plugin = PerLayerPrecision("fp32", on_policy_change="accept")
    resume(plugin, model=changed)
    assert {(entry["layer"], entry["from"], entry["to"]) for entry in plugin.history} == {("", "bf16", "fp32")}


class Twofold(nn.Module):
    """Two blocks that hold the same layer."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(6, 6)
        self.first, self.second = nn.Sequential(shared), nn.Sequential(shared, nn.Linear(6, 2))

    def forward(self, x):
        return self.second(self.first(x))


def test_an_old_policy_that_contradicts_itself_on_the_model_leaves_nothing_half_changed():
    fit(Task(Twofold()), ours("fp16"), callbacks=[save()])
    checkpoint = torch.load("run.ckpt", weights_only=True)
    rules = [{"layers": "net.first", "compute": "fp32"}, {"layers": "net.second", "compute": "bf16"}]
    checkpoint["PerLayerPrecision"]["policy"] = {"default": "fp16", "rules": rules}
    checkpoint["PerLayerPrecision"]["configured"] = {"default": "bf16", "rules": []}
    torch.save(checkpoint, "run.ckpt")
    plugin = ours("fp16", on_policy_change="accept")
    move = Call("on_train_batch_end", lambda run, model: plugin.edit_policy({"net.second.1": "bf16"}), at=1)
    fit(Task(Twofold()), plugin, callbacks=[move])
    policy, history = plugin.policy, list(plugin.history)
    with pytest.raises(MixPrecError, match=r"layer 'net.first.0' is also 'net.second.0'") as caught:
        resume(plugin, model=Task(Twofold()))
    one_line(caught)
    assert plugin.policy == policy
    assert plugin.history == history
    assert plugin.assignment["net.second.1"].compute == "bf16"
