"""AdaptivePrecision in a Trainer: runs that fp16 loses or spoils end as in fp32, and only the culprit moves."""

import contextlib
import csv
import io
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from adaptive_models import (
    ADAM,
    Encoding,
    Lessons,
    Loud,
    Saturated,
    Silent,
    adapt,
    attending,
    encoded,
    late,
    loud,
    silent,
    stock,
    train,
)
from lightnings import CSVLogger, MixedPrecision
from plugin_models import Call, Task, one_line, trainer
from selection import slow
from torch import nn

from lightning_mixprec import OverflowMonitor, PerLayerPrecision
from lightning_mixprec.callbacks import monitor
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.errors import SupportError
from lightning_mixprec.records.changes import Decision

# Name: the model, its batches, the culprit, what it needs, and how the loss of Lightning's own fp16 ends.
FAILURES = {
    "a projection beyond 65504": (loud, Lessons, "net.down", "bf16", "not finite"),
    "attention written inline": (attending, Lessons, "net", "bf16", "not finite"),
    "an epsilon in the loss": (Saturated, Lessons, "", "bf16", "not finite"),
    "phases in the thousands": (silent, encoded, "net.encode", "fp32", "worse"),
}
EACH_FAILURE = pytest.mark.parametrize(("make", "batches", "culprit", "to", "ends"), FAILURES.values(), ids=FAILURES)


@EACH_FAILURE
def test_a_run_that_fp16_spoils_ends_as_in_fp32_and_only_the_culprit_moves(make, batches, culprit, to, ends):
    reference, lost = (late(train(make, plugin, batches=batches())[0].losses) for plugin in (None, stock()))
    assert not lost < float("inf") if ends == "not finite" else lost > 10 * reference
    run = adapt(make, batches=batches())
    assert late(run.module.losses) < 1.2 * reference + 1e-3
    assert run.is_finite
    assert run.moves == [(culprit, "fp16", to)]
    assert run.formats == dict.fromkeys(run.formats, "fp16") | {culprit: to}


@EACH_FAILURE
def test_the_history_says_what_was_decided_and_why(make, batches, culprit, to, ends):
    run = adapt(make, batches=batches())
    [entry], [decision] = run.plugin.history, run.adaptive.decisions
    assert (entry["step"], entry["layer"]) == (decision["step"], culprit)
    assert ("fp16" in entry["from"], to in entry["to"]) == (True, True)
    assert entry["reason"] == f"adaptive: {decision['reason']}"
    assert entry["evidence"] == decision["evidence"]
    assert json.loads(json.dumps(decision)).keys() == decision.keys()
    assert decision["kind"] == "promote"
    loud_one = ends == "not finite"
    assert decision["reason"] == "overflow" if loud_one else decision["reason"].startswith("gradients of")
    assert decision["evidence"]["is_finite"] is not loud_one
    assert run.plugin.policy.resolve(run.module)[culprit].compute == to


def test_the_layer_that_was_moved_computes_in_the_new_format():
    seen = []

    class Noting(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            if not torch.is_inference_mode_enabled() and torch.is_grad_enabled():
                seen.append(out.dtype)
            return out

    def make():
        module = loud()
        down = Noting(16, 16)
        down.load_state_dict(module.net.down.state_dict())
        module.net.down = down
        return module

    dtypes = []
    look = Call("on_before_zero_grad", lambda run, model: dtypes.append(seen[-1]))
    run = adapt(make, callbacks=[look])
    assert run.moves == [("net.down", "fp16", "bf16")]
    skipped = run.plugin.skipped_steps
    assert skipped <= 2
    assert set(dtypes[:skipped]) == {torch.float16}
    assert set(dtypes[skipped + 1 :]) == {torch.bfloat16}


def test_what_is_wider_already_does_not_move_with_a_container():
    run = adapt(attending, plugin={"default": "fp16", "net.head": "fp32"})
    assert run.moves == [("net", "fp16", "bf16")]
    assert (run.formats["net.head"], run.formats["net.qkv"]) == ("fp32", "fp16")


# The user's word


@pytest.mark.parametrize("pin", ["net.down", ["net.head", "net.d*"], "re:.*down"], ids=str)
def test_a_pinned_layer_stays(pin):
    # At a loss scale that is searched for, a run that nothing saves ends with an error.
    run = adapt(adaptive=AdaptivePrecision(pin=pin), plugin=PerLayerPrecision("fp16", loss_scaling=1024))
    assert "net.down" not in {name for name, _, _ in run.moves}
    assert run.formats["net.down"] == "fp16"


def test_with_everything_pinned_nothing_moves():
    run = adapt(adaptive=AdaptivePrecision(pin="**"), plugin=PerLayerPrecision("fp16", loss_scaling=1024))
    assert (run.adaptive.decisions, run.plugin.history) == ([], [])


def test_a_pin_that_matches_nothing_is_an_error_before_training():
    started = Call("on_train_start", lambda run, model: None)
    with pytest.raises(ValueError, match=r"net\.dwon.*net\.down") as caught:
        adapt(adaptive=AdaptivePrecision(pin=["net.dwon"]), callbacks=[started])
    one_line(caught)
    assert started.calls == 0


@pytest.mark.parametrize("format", ["fp32", "fp64", "bf16"])
def test_a_rule_of_the_user_is_never_narrowed(format):
    policy = {"default": "fp16", "net.down": format, "net.norm": "fp32"}
    eager = AdaptivePrecision(every_n_steps=1, dwell_steps=1)
    run = adapt(partial(Task, Loud(deviation=0.3)), eager, policy)
    assert (run.moves, run.plugin.history) == ([], [])
    assert (run.formats["net.down"], run.formats["net.norm"]) == (format, "fp32")


def test_promotions_are_taken_back_to_the_rule_of_the_user_and_no_further():
    policy = {"default": "fp16", "net.encode": "bf16"}
    batches = passing()
    run = adapt(partial(Task, Silent()), AdaptivePrecision(every_n_steps=2, dwell_steps=2), policy, batches=batches)
    assert run.moves[:2] == [("net.encode", "bf16", "fp32"), ("net.encode", "fp32", "bf16")]


def test_layers_with_most_of_the_flops_stay_low_if_a_share_has_to():
    free = adapt(silent, batches=encoded())
    with pytest.warns(UserWarning, match="min_low_precision_share=0.99 forbids it"):
        bound = adapt(silent, AdaptivePrecision(min_low_precision_share=0.99), batches=encoded())
    assert free.moves == [("net.encode", "fp16", "fp32")]
    share = free.trainer.callback_metrics["mixprec/low_precision_share"].item()
    assert share == 1 - (6 * 16) / (6 * 16 + 16 * 16 + 16 * 2)
    assert all(to != "fp32" for _, _, to in bound.moves)
    assert bound.trainer.callback_metrics["mixprec/low_precision_share"].item() >= 0.99


class Fine(nn.Module):
    """What it is to learn needs a layer in fp32 that has nearly all of its flops."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = Encoding(), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.encode(x))


def test_by_default_half_of_the_flops_stay_low_and_what_that_forbids_is_told_once(tmp_path):
    with pytest.warns(UserWarning, match="min_low_precision_share") as caught:
        bound = adapt(partial(Task, Fine()), batches=encoded())
    (told,) = [str(each.message) for each in caught if "min_low_precision_share" in str(each.message)]
    assert "'net.encode' fp16 -> fp32 would be needed (" in told
    assert "leaves 25.0% of the flops in at most 16 bits: min_low_precision_share=0.5 forbids it" in told
    assert bound.moves == [] and bound.trainer.callback_metrics["mixprec/low_precision_share"] == 1
    for share in (0, None):
        free = adapt(partial(Task, Fine()), AdaptivePrecision(min_low_precision_share=share), batches=encoded())
        assert free.moves == [("net.encode", "fp16", "fp32")]


WRONG = {
    "mode": [("mode", "watch"), ("mode", None)],
    "pin": [("pin", 3), ("pin", [3])],
    "min_low_precision_share": [("min_low_precision_share", value) for value in (-0.1, 1.5, True, "half")],
    **{
        name: [(name, value) for value in (0, -1, 1.5, True, "ten")]
        for name in ("every_n_steps", "dwell_steps", "max_trials", "max_assignments")
    },
}


@pytest.mark.parametrize(("name", "value"), [each for group in WRONG.values() for each in group], ids=str)
def test_a_wrong_argument_is_one_line_that_names_it(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        AdaptivePrecision(**{name: value})
    one_line(caught)


@pytest.mark.parametrize("plugin", [None, MixedPrecision("bf16-mixed", "cpu")], ids=["fp32", "bf16-mixed"])
def test_another_plugin_is_refused_before_training(plugin):
    with pytest.raises(SupportError, match="PerLayerPrecision") as caught:
        train(loud, plugin, [AdaptivePrecision()])
    one_line(caught)


# Back again


def passing(bad=30, good=60):
    """Phases in the thousands, then next to nothing, then in the thousands again."""
    lessons = Lessons(2 * bad + good)
    inputs = [x if not bad <= number < bad + good else x * 1e-3 for number, (x, _) in enumerate(lessons.batches)]
    lessons.batches = [(x, Encoding()(x)[:, :2]) for x in inputs]
    return lessons


def test_what_was_promoted_for_a_failure_that_passes_comes_back_and_goes_again_on_a_relapse():
    run = adapt(silent, AdaptivePrecision(every_n_steps=2, dwell_steps=4), batches=passing())
    up, down = ("net.encode", "fp16", "fp32"), ("net.encode", "fp32", "fp16")
    assert run.moves == [up, down, up]
    first, second, third = [decision["step"] for decision in run.adaptive.decisions]
    assert first < 10
    assert 30 <= second < 45
    assert 90 <= third < 100
    assert [decision["kind"] for decision in run.adaptive.decisions] == ["promote", "demote", "promote"]


def flickering(bad):
    """Phases in the thousands in the given batches, next to nothing in the others."""
    lessons = Lessons(120)
    inputs = [x * (1.0 if number in bad else 1e-3) for number, (x, _) in enumerate(lessons.batches)]
    lessons.batches = [(x, Encoding()(x)[:, :2]) for x in inputs]
    return lessons


def test_after_a_relapse_a_promotion_stays_four_times_as_long():
    run = adapt(
        silent,
        AdaptivePrecision(every_n_steps=1, dwell_steps=10),
        batches=flickering({*range(5), *range(40, 45)}),
    )
    assert [decision["kind"] for decision in run.adaptive.decisions] == ["promote", "demote", "promote", "demote"]
    first, second, third, fourth = [decision["step"] for decision in run.adaptive.decisions]
    assert 10 <= second - first <= 13
    assert 40 <= third <= 42
    assert 40 <= fourth - third <= 43


@pytest.mark.filterwarnings("ignore:.*max_assignments=. forbids it")
@pytest.mark.parametrize("most", [1, slow(2)])
def test_there_are_at_most_so_many_assignments(most):
    seen = []
    look = Call("on_before_zero_grad", lambda run, model: seen.append(dict(run.precision_plugin.assignment)))
    adaptive = AdaptivePrecision(every_n_steps=1, dwell_steps=1, max_assignments=most)
    adapt(silent, adaptive, callbacks=[look], batches=flickering({*range(10), *range(40, 50)}))
    assert len(seen) == 120
    assert len([each for number, each in enumerate(seen) if each not in seen[:number]]) == most


# What is said


def test_progress_is_logged():
    logger = CSVLogger(".")
    run = adapt(batches=Lessons(12), logger=logger, log_every_n_steps=1)
    metrics = run.trainer.callback_metrics
    assert metrics["mixprec/policy_version"] == 1.0
    assert metrics["mixprec/low_precision_share"] == 1.0
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    versions = [float(row["mixprec/policy_version"]) for row in rows if row["mixprec/policy_version"]]
    assert versions == sorted(versions)
    assert versions[-1] == 1.0


def test_every_move_is_one_line_and_the_summary_lists_them(capsys):
    adapt(silent, AdaptivePrecision(every_n_steps=2, dwell_steps=4), batches=passing())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("AdaptivePrecision")]
    assert len(lines) == 4
    for line, arrow in zip(lines, ["fp16 -> fp32", "fp32 -> fp16", "fp16 -> fp32"], strict=False):
        assert line.startswith("AdaptivePrecision: step ")
        assert f"'net.encode' {arrow}" in line
        assert line.endswith(")")
    assert lines[3].startswith("AdaptivePrecision: 3 moves, ")


def test_a_decision_with_many_moves_is_a_number_and_the_first_few_and_one_row_of_the_summary():
    moves = tuple((f"net.{number}", "fp16", "bf16") for number in range(40))
    adaptive, printed = AdaptivePrecision(), io.StringIO()
    adaptive._trainer = trainer(None)
    decision = Decision("promote", moves, None, False, "overflow", {}, {})
    adaptive.decisions = [{"step": 3, **decision.to_dict()}]
    with contextlib.redirect_stdout(printed):
        adaptive._say(decision, "")
    (line,) = printed.getvalue().splitlines()
    assert "40 layers: 'net.0' fp16 -> bf16, 'net.1'" in line and len(line) < 200
    _, (_, *rows) = adaptive._summary()
    assert rows == [["'net.0', 'net.1', 'net.2' and 37 more", "3", "fp16", "bf16", "overflow"]]


def test_without_a_logger_one_line_says_where_files_go(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(monitor, "rank_zero_info", said.append)
    adapt(silent, batches=Lessons(2), callbacks=[OverflowMonitor()], default_root_dir=tmp_path)
    assert said == [f"There is no logger: what callbacks of lightning_mixprec write goes to {tmp_path.resolve()}."]
    adapt(silent, batches=Lessons(2), logger=CSVLogger(tmp_path))
    assert len(said) == 1


def test_rows_tell_of_samples_and_decisions():
    run = adapt(silent, batches=encoded(20))
    rows = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    assert {row["monitor"] for row in rows} == {"adaptive"}
    assert [row["step"] for row in rows if "decision" in row] == [run.adaptive.decisions[0]["step"]]
    [decision] = [row for row in rows if "decision" in row]
    assert decision["decision"]["moves"] == [["net.encode", "fp16", "fp32"]]
    assert 0 < decision["passes"] <= 48 + 2
    gaps = [row["sample"]["min_grad_cosine"] for row in rows if "sample" in row]
    assert max(gaps[:2]) < 0.99 < min(gaps[2:])


class Summed(Task):
    """A loss that is a sum over many numbers, whose gradients fit fp16 at a small loss scale alone."""

    def training_step(self, batch, batch_idx):
        return 300 * super().training_step(batch, batch_idx)


def test_a_long_search_for_the_loss_scale_accuses_no_layer():
    plugin, adaptive = PerLayerPrecision("fp16"), AdaptivePrecision()
    net = nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
    train(partial(Summed, net, ADAM), plugin, [adaptive], Lessons(20))
    assert 6 <= plugin.skipped_steps < 9 and adaptive.decisions == []
