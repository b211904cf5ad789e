"""One callback object in several fits: it begins anew with a run that does, and goes on with one that goes on."""

import json
from pathlib import Path

import pytest
import torch
from plugin_models import Batches, Task, mlp, ours, trainer

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    MixPrecError,
    OverflowMonitor,
    PrecisionReport,
    PrecisionScheduler,
    UnderflowMonitor,
)
from lightning_mixprec.report.reading import read_records

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*vanish in", "ignore:phase 1 never comes", "ignore:.*You're resuming from a checkpoint"
)

EVERYBODY = {
    "overflow": OverflowMonitor,
    "underflow": lambda: UnderflowMonitor(2),
    "fidelity": lambda: FidelityMonitor(2),
    "report": lambda: PrecisionReport(2),
    "schedule": lambda: PrecisionScheduler([{"at": {"step": 1}, "edit": {"net.0": "fp32"}}]),
    "adaptive": lambda: AdaptivePrecision(every_n_steps=2, dwell_steps=2),
}
KEPT = ("reasons", "skipped_steps", "latest", "came", "decisions", "events")


def run(callbacks, batches=4, ckpt_path=None, **options):
    torch.manual_seed(0)
    fitted = trainer(ours("fp16"), callbacks=list(callbacks), **options)
    fitted.fit(Task(mlp()), Batches(6, count=batches), ckpt_path=ckpt_path)
    return fitted


def seen_by(callback):
    state = callback.state_dict()
    state.get("steered", {}).pop("copy", None)  # of weights
    return state


def rows():
    path = Path("mixprec.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("name", EVERYBODY)
def test_another_run_is_seen_as_by_a_new_object(name):
    used, new = EVERYBODY[name](), EVERYBODY[name]()
    run([used], batches=1)
    first = seen_by(used)
    run([used])
    run([new])
    assert str(seen_by(used)) == str(seen_by(new)) != str(first)


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_trainer_that_trains_on_is_the_same_run(name):
    callback = EVERYBODY[name]()
    fitted = run([callback])
    run_ids = {row["run_id"] for row in rows()}
    before = seen_by(callback)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(fitted.lightning_module, Batches(6))
    after = seen_by(callback)
    assert len(run_ids) <= 1 and {row["run_id"] for row in rows()} == run_ids  # of overflows there are none
    counted = [key for key in ("steps", "batches_seen") if key in before]
    assert all(after[key] == 2 * before[key] > 0 for key in counted)
    assert all(len(after[key]) >= len(before[key]) for key in KEPT if isinstance(before.get(key), (list, dict)))


def test_a_run_that_goes_on_from_a_checkpoint_keeps_its_id_and_another_one_has_another():
    first = run([OverflowMonitor(), FidelityMonitor(1)])
    first.save_checkpoint("first.ckpt")
    (first_id,) = {row["run_id"] for row in rows()}
    Path("mixprec.jsonl").unlink()
    run([FidelityMonitor(1)], max_epochs=2)  # its own
    (other_id,) = {row["run_id"] for row in rows()}
    assert other_id != first_id
    Path("mixprec.jsonl").unlink()
    run([FidelityMonitor(1), OverflowMonitor()], ckpt_path="first.ckpt", max_epochs=2)
    assert {row["run_id"] for row in rows()} == {first_id}


def test_of_several_runs_in_a_folder_the_latest_is_read_or_the_one_that_is_asked_for():
    older = run([FidelityMonitor(1), PrecisionReport(1)], batches=6)
    assert older.global_step == 6
    newer = run([FidelityMonitor(2)], batches=3)
    older_id, newer_id = dict.fromkeys(row["run_id"] for row in rows())
    here = str(Path.cwd())
    latest, asked, other = (read_records(f"{here}{which}") for which in ("", f"@{older_id}", f"@{newer_id}"))
    assert (latest.run_id, asked.run_id) == (newer_id, older_id)
    assert {row["step"] for row in latest.fidelity} == {0, 2} == {row["step"] for row in other.fidelity}
    assert latest.curve == [] and latest.run == {}
    assert {row["step"] for row in asked.fidelity} == set(range(6)) and len(asked.curve) == 6
    assert newer.global_step == 3
    with pytest.raises(MixPrecError, match=f"no run 'xyz' in .*{newer_id}, {older_id}") as caught:
        read_records(f"{here}@xyz")
    assert "\n" not in str(caught.value)


def test_rows_without_an_id_are_those_of_a_run_that_went_on_or_of_an_older_one():
    run([FidelityMonitor(1)], batches=6)
    lines = rows()
    (run_id,) = {row["run_id"] for row in lines}

    def write(has_id):
        kept = [row if has_id(row) else {key: row[key] for key in row.keys() - {"run_id"}} for row in lines]
        Path("mixprec.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        return read_records(Path.cwd())

    went_on = write(lambda row: row["step"] >= 3)  # written by 0.1.0 until its checkpoint
    assert (went_on.run_id, {row["step"] for row in went_on.fidelity}) == (run_id, set(range(6)))
    old = write(lambda row: False)
    assert (old.run_id, {row["step"] for row in old.fidelity}) == ("", set(range(6)))
    old_rows = Path("mixprec.jsonl").read_text()
    run([FidelityMonitor(1)], batches=2)
    Path("mixprec.jsonl").write_text(old_rows + "".join(json.dumps(row) + "\n" for row in rows()[len(lines) :]))
    assert {row["step"] for row in read_records(Path.cwd()).fidelity} == {0, 1}
