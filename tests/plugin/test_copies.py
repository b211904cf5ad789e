"""Copies of the plugin, of a Trainer that holds it: what was configured and learned goes along, the run does not."""

import copy
import pickle

import pytest
from known_results import INF, Batches, Line, fit, ours, trainer_of
from plugin_models import Call

from lightning_mixprec import LossScaling, MixPrecError, PerLayerPrecision


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize("copied", [pickled, copy.deepcopy], ids=["pickle", "deepcopy"])
VALUES = [0.5, INF, 0.25]


def plugin_of():
    return PerLayerPrecision({"default": "bf16", "layer": "fp16"}, LossScaling(init_scale=1024), eval_policy="fp32")


@COPIES
def test_a_plugin_can_be_copied_before_its_run(copied):
    model, oracle = Line(), Line()
    plugin = copied(plugin_of())
    trainer = fit(model, plugin, VALUES)
    fit(oracle, plugin_of(), VALUES)
    assert model.travelled == oracle.travelled == 0.75
    assert (trainer.global_step, plugin.skipped_steps, plugin.scaler.get_scale()) == (2, 1, 512)


@COPIES
def test_a_trainer_can_be_copied_as_ddp_spawn_does(copied):
    model = Line()
    trainer = copied(trainer_of(plugin_of()))
    trainer.fit(model, Batches(VALUES))
    assert (model.travelled, trainer.precision_plugin.skipped_steps) == (0.75, 1)


@COPIES
def test_a_copy_after_a_run_still_says_what_was_learned_and_runs_on(copied):
    plugin = plugin_of()
    fit(Line(), plugin, VALUES)
    twin = copied(plugin)
    assert twin.state_dict() == plugin.state_dict()
    assert twin.assignment["layer"].compute == "fp16"
    fit(Line(), twin, VALUES)
    assert (twin.skipped_steps, plugin.skipped_steps) == (2, 1)


@COPIES
def test_a_copy_from_the_middle_of_a_run_belongs_to_no_run(copied):
    plugin = ours()
    taken = Call("on_train_batch_end", lambda trainer, model: copied(plugin), at=1)
    trainer = fit(Line(), plugin, [*VALUES, INF], callbacks=[taken])
    (twin,) = taken.results
    assert (twin.skipped_steps, plugin.skipped_steps, trainer.global_step) == (1, 2, 2)
    with pytest.raises(MixPrecError, match="none is running"):
        twin.set_policy("bf16")
    fit(Line(), twin, VALUES)
    assert (twin.skipped_steps, plugin.skipped_steps) == (2, 2)
