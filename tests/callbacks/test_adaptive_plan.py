"""AdaptivePrecision with a plan: a wide policy finds its narrower form in the run, and comes back at a relapse."""

import pytest
from adaptive_models import SAFE, adapt, loud, phases, planned, silent
from lightnings import ModelCheckpoint
from plugin_models import Call, one_line, same

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.errors import MixPrecError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
COUNT = 24


def watching(made, **options):
    return AdaptivePrecision(**{"every_n_steps": 2, "plan": made, **options})


def test_an_fp32_policy_finds_its_narrower_form_and_what_needs_fp32_stays():
    made = planned({**SAFE, "net.encode": 1.0}, budget={"loss_gap": 1e-3})
    assert made.policy.resolve(silent())["net.encode"].compute == "fp32"
    run = adapt(silent, watching(made, min_low_precision_share=0), PerLayerPrecision("fp32"), batches=phases(1.0))
    chosen = {name: each.compute for name, each in made.policy.resolve(silent()).items()}
    assert run.formats == chosen
    assert {run.formats[name] for name in ("net.body", "net.head")} == {"bf16"}
    assert {decision["kind"] for decision in run.adaptive.decisions} == {"demote"}
    assert {(entry["from"], entry["to"]) for entry in run.plugin.history} == {("fp32", "bf16")}
    assert all("in the narrower format of the plan" in entry["reason"] for entry in run.plugin.history)
    assert run.is_finite


def test_what_a_plan_ranks_wrong_fails_its_trial_and_stays():
    made = planned()
    assert made.policy.to_dict() == {"default": "bf16", "rules": []}
    run = adapt(silent, watching(made), PerLayerPrecision("fp32"), batches=phases(1.0))
    assert run.formats["net.encode"] == "fp32"
    assert run.formats["net.body"] == "bf16"
    assert run.adaptive.state_dict()["steered"]["demotions"]["refused"] == ["net.encode"]


def relapsing():
    return phases(1e-4, 1.0)


def test_at_a_relapse_the_layer_to_blame_goes_back_alone():
    made = planned()
    run = adapt(silent, watching(made), PerLayerPrecision("fp32"), batches=relapsing())
    kinds = [decision["kind"] for decision in run.adaptive.decisions]
    assert kinds.count("promote") == 1
    (back,) = [decision for decision in run.adaptive.decisions if decision["kind"] == "promote"]
    assert back["moves"] == [["net.encode", "bf16", "fp32"]]
    assert back["step"] <= COUNT // 2 + 2
    assert run.formats["net.encode"] == "fp32"
    assert run.formats["net.body"] == "bf16"
    assert run.plugin.history[-1]["reason"].startswith("adaptive: ")


def test_without_a_plan_nothing_gets_narrower():
    run = adapt(silent, AdaptivePrecision(every_n_steps=2), PerLayerPrecision("fp32"), batches=phases(1e-4))
    assert run.moves == []


def test_as_advice_it_says_so_and_moves_nothing(tmp_path):
    made = planned()
    options = {"batches": phases(1e-4), "default_root_dir": tmp_path}
    run = adapt(silent, watching(made, mode="advise"), PerLayerPrecision("fp32"), **options)
    assert set(run.formats.values()) == {"fp32"}
    assert ("net.body", "fp32", "bf16") in run.moves


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_a_run_that_is_resumed_decides_as_one_that_was_not(stop, tmp_path):
    made = planned()
    made.to_file(tmp_path / "plan.json")

    def go(path=None, callbacks=()):
        callback = watching(tmp_path / "plan.json")
        options = {"batches": relapsing(), "ckpt_path": path, "default_root_dir": tmp_path}
        return adapt(silent, callback, PerLayerPrecision("fp32"), callbacks, **options)

    whole = go()
    saved = tmp_path / "stopped.ckpt"
    save = Call("on_train_batch_end", lambda run, *_: run.save_checkpoint(saved) if run.global_step == stop else None)
    go(callbacks=[save])
    resumed = go(saved)
    assert resumed.adaptive.decisions == whole.adaptive.decisions
    assert resumed.plugin.history == whole.plugin.history
    assert resumed.formats == whole.formats
    assert same(resumed.module.state_dict(), whole.module.state_dict())


def test_a_plan_of_another_model_or_none_is_one_line_before_training(tmp_path):
    with pytest.raises(MixPrecError, match="the plan is of another model") as caught:
        adapt(loud, watching(planned()), PerLayerPrecision("fp32"))
    one_line(caught)
    with pytest.raises(MixPrecError, match=r"cannot read .*nothing.json") as caught:
        AdaptivePrecision(plan=tmp_path / "nothing.json")
    one_line(caught)
    with pytest.raises(MixPrecError, match="plan is a int; give a PrecisionPlan, the path of its file, or None"):
        AdaptivePrecision(plan=3)


def test_a_checkpoint_of_a_run_without_a_plan_is_read_with_one(tmp_path):
    def saving():
        return ModelCheckpoint(dirpath=tmp_path, save_last=True)

    first = adapt(
        silent,
        AdaptivePrecision(every_n_steps=2),
        PerLayerPrecision("fp32"),
        [saving()],
        phases(1e-4),
        enable_checkpointing=True,
    )
    assert "demotions" not in first.adaptive.state_dict()["steered"]
    options = {
        "ckpt_path": tmp_path / "last.ckpt",
        "max_epochs": 2,
        "batches": phases(1e-4),
        "enable_checkpointing": True,
    }
    second = adapt(silent, watching(planned()), PerLayerPrecision("fp32"), [saving()], **options)
    assert second.moves != []
