"""The scale, the counters and what skipped steps held back go on where a checkpoint left them."""

import json
from functools import partial

import pytest
import torch
from known_results import INF, SGD, Batches, Line, Saving, fit, ours, stock, trainer_of
from torch.optim.lr_scheduler import ExponentialLR

from lightning_mixprec.errors import ScalingError

VALUES = [INF, 0.5, 0.25, INF]
NAME = "PerLayerPrecision"


def halving(optimizer, frequency=1):
    return {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step", "frequency": frequency}


def saved_by(plugin, path, values=VALUES, model=Line, **options):
    fit(model(), plugin, values, callbacks=[Saving(path)], **options)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("hysteresis", [1, 2])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(frequency, hysteresis, tmp_path):
    line = partial(Line, schedule=partial(halving, frequency=frequency))
    scaling = {"growth_interval": 3, "hysteresis": hysteresis, "max_scale": 65536.0}
    saved_by(ours(loss_scaling=scaling), tmp_path / "run", model=line)
    ends = []
    for path in (None, tmp_path / "run"):
        model, plugin = line(), ours(loss_scaling=scaling)
        trainer = fit(model, plugin, VALUES, path, max_epochs=4)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        ends.append((model.travelled, plugin.skipped_steps, plugin.scaler.state_dict(), trainer.global_step, rate))
    assert ends[0] == ends[1]
    assert ends[0][1] == 8


def test_the_state_is_plain_and_survives_json(tmp_path):
    state = saved_by(ours(), tmp_path / "run", [0.5, INF, INF])[NAME]
    assert json.loads(json.dumps(state)) == state
    assert state["scaler"]["scale"] == 16384.0
    assert state["steps"]["skipped_steps"] == 2


def test_a_row_of_skips_goes_on_over_a_checkpoint(tmp_path):
    few = {"max_consecutive_skips": 3}
    saved_by(ours(loss_scaling=few), tmp_path / "run", [0.5, INF, INF])
    plugin = ours(loss_scaling=few)
    with pytest.raises(ScalingError, match="3 optimizer steps in a row"):
        fit(Line(), plugin, [INF, 0.5, 0.5], tmp_path / "run", max_epochs=2)
    assert plugin.skipped_steps == 3


def test_the_scale_of_a_stock_checkpoint_is_taken_over(tmp_path):
    saved_by(stock(), tmp_path / "run", [INF, INF, 0.5])
    plugin = ours()
    fit(Line(), plugin, [0.5, 0.5, 0.5], tmp_path / "run", max_epochs=2)
    assert plugin.scaler.get_scale() == 16384.0
    assert plugin.scaler.state_dict()["growth_tracker"] == 4


def test_a_collapsed_stock_scale_starts_again_with_a_warning(tmp_path):
    saved_by(stock(), tmp_path / "run", [INF] * 170)
    plugin, model = ours(), Line()
    with pytest.warns(UserWarning, match="had collapsed"):
        fit(model, plugin, [0.5], tmp_path / "run", max_epochs=2)
    assert plugin.scaler.get_scale() == 65536.0
    assert model.travelled == 0.5


def test_a_stock_checkpoint_without_a_scaler_resumes(tmp_path):
    saved_by(stock("32-true"), tmp_path / "run", [0.5, 0.25])
    plugin, model = ours(), Line()
    fit(model, plugin, [0.5, INF], tmp_path / "run", max_epochs=2)
    assert (model.travelled, plugin.skipped_steps, plugin.scaler.get_scale()) == (1.25, 1, 32768.0)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
def test_a_checkpoint_of_ours_resumes_with_lightnings_own_plugins(precision, tmp_path):
    saved_by(ours(), tmp_path / "run", [0.5, INF])
    model = Line()
    trainer = fit(model, stock(precision), [0.25, 0.25], tmp_path / "run", max_epochs=2)
    assert model.travelled == 1.0
    assert trainer.global_step == 3


@pytest.mark.parametrize("optimizer", [partial(SGD, momentum=0.5), partial(torch.optim.AdamW, lr=0.1)])
def test_a_checkpoint_taken_after_the_run_holds_its_counters(optimizer, tmp_path):
    trainer = fit(Line(optimizer), ours(), VALUES)
    trainer.save_checkpoint(tmp_path / "run")
    state = torch.load(tmp_path / "run", weights_only=True)
    assert state["global_step"] == 2
    assert state[NAME]["steps"]["skipped_steps"] == 2
    assert state[NAME]["scaler"]["scale"] == 16384.0


def test_weights_of_a_resumed_run_are_validated_without_its_counters(tmp_path):
    class Validated(Line):
        def validation_step(self, batch, batch_idx):
            pass

    saved_by(ours(), tmp_path / "run")
    plugin = ours()
    trainer_of(plugin).validate(Validated(), Batches([0.5]), ckpt_path=tmp_path / "run", verbose=False)
    assert plugin.skipped_steps == 0
