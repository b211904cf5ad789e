"""The policy that AdaptivePrecision arrives at, as a file: a later run takes it and needs no controller."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from adaptive_models import ADAM, Lessons, Loud, adapt, encoded, late, loud, silent, train
from lightnings import CSVLogger, ModelCheckpoint
from plugin_models import Call, Task, same
from selection import slow_but_for
from torch import nn

from lightning_mixprec import PerLayerPrecision, PrecisionPolicy
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision

LEARNED, ADVISED = Path("learned_policy.yaml"), Path("advised_policy.yaml")
SCALE = {"init_scale": 1024}
"""With which no step is lost to the search for a loss scale."""


def plugin_of(policy):
    return PerLayerPrecision(str(policy), loss_scaling=SCALE)


def resolved(policy, module):
    return {name: (layer.compute, layer.output) for name, layer in policy.resolve(module).items()}


@pytest.mark.parametrize(("make", "batches"), [(loud, Lessons), (silent, encoded)], ids=["range", "precision"])
def test_a_run_with_the_learned_policy_needs_no_controller(make, batches):
    learning = adapt(make, plugin=plugin_of("fp16"), batches=batches())
    policy = PrecisionPolicy.from_file(LEARNED)
    assert resolved(policy, learning.module) == resolved(learning.plugin.policy, learning.module)
    frozen = plugin_of(LEARNED)
    module, _ = train(make, frozen, batches=batches())
    assert frozen.skipped_steps == 0
    # Learning takes the first two or three steps, which the frozen run has more.
    first = train(make, None, batches=batches())[0].losses[0].item()
    assert late(module.losses) == pytest.approx(late(learning.module.losses), abs=0.02 * first)
    assert resolved(policy, module) == {
        name: (layer.compute, layer.output) for name, layer in frozen.assignment.items()
    }
    again = adapt(make, plugin=plugin_of(LEARNED), batches=batches())
    assert again.moves == []
    assert same(again.module.losses, module.losses)


def test_from_the_move_on_it_computes_what_a_run_with_the_learned_policy_computes():
    """A run that starts from the weights, optimizer and scale of the move on the batches that are left."""
    states = []

    def keep(trainer, model):
        if not trainer.precision_plugin.history:  # the move comes after this hook
            states[:] = deepcopy([model.state_dict(), trainer.optimizers[0].state_dict()])

    learning = adapt(silent, callbacks=[Call("on_train_batch_start", keep)], batches=encoded())
    weights, optimizer = states
    begun = learning.adaptive.decisions[0]["step"]

    class Continued(Task):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            made.load_state_dict(optimizer)
            return made

    def make():
        module = Continued(silent().net, ADAM)
        module.load_state_dict(weights)
        return module

    rest = encoded()
    rest.batches = rest.batches[begun:]
    module, _ = train(make, PerLayerPrecision(str(LEARNED)), batches=rest)
    assert 0 < begun < 10
    assert same(module.losses, learning.module.losses[begun:])
    assert same(module.state_dict(), learning.module.state_dict())


def test_a_run_without_moves_learns_its_own_policy():
    policy = {"default": "fp16", "net.0": "c=fp32,o=input"}
    run = adapt(lambda: Task(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), ADAM), plugin=policy)
    assert PrecisionPolicy.from_file(LEARNED) == PrecisionPolicy.from_dict(policy) == run.plugin.policy


def test_it_is_written_with_every_checkpoint_into_the_log_directory():
    seen = []

    def look(trainer, model):
        path = Path(trainer.log_dir, LEARNED)
        seen.append(PrecisionPolicy.from_file(path) == trainer.precision_plugin.policy if path.exists() else None)

    checkpoint = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1)
    options = {"logger": CSVLogger("."), "enable_checkpointing": True, "log_every_n_steps": 1}
    run = adapt(silent, callbacks=[Call("on_train_batch_end", look), checkpoint], batches=encoded(12), **options)
    assert run.moves == [("net.encode", "fp16", "fp32")]
    assert not LEARNED.exists()
    # The checkpoint comes after this look, so the first one that sees the file is that of the fifth batch.
    assert seen == [None] * 4 + [True] * 8


def test_advice_is_written_as_advice():
    adapt(loud, AdaptivePrecision("advise"), PerLayerPrecision("fp16", loss_scaling=1024), batches=Lessons(6))
    assert not LEARNED.exists()
    policy = PrecisionPolicy.from_file(ADVISED)
    module, _ = train(loud, PerLayerPrecision(str(ADVISED)))
    assert policy.resolve(module)["net.down"].compute == "bf16"
    assert all(bool(torch.isfinite(loss)) for loss in module.losses)


def test_a_directory_that_cannot_be_written_to_costs_one_warning_and_the_run_goes_on():
    Path("file").write_text("not a directory")
    checkpoint = ModelCheckpoint(dirpath="saved", every_n_train_steps=2, save_top_k=-1)
    options = {"default_root_dir": "file", "callbacks": [checkpoint], "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        run = adapt(batches=Lessons(8), **options)
    assert len([each for each in caught if str(LEARNED) in str(each.message)]) == 1
    assert len([each for each in caught if "mixprec.jsonl" in str(each.message)]) == 1
    assert run.moves == [("net.down", "fp16", "bf16")]
    assert run.trainer.global_step == 8 - run.plugin.skipped_steps


KEYS = ["a*b", "[0]", "[0:2]", "re:down", "?", "**", "x y", "ö", "0", "-1", "{a}", "!", "a,b", "c=fp32", "#x", "~"]


@pytest.mark.parametrize("key", slow_but_for(KEYS[::4], KEYS), ids=repr)
def test_a_layer_with_an_odd_name_is_moved_alone_and_found_again(key):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            inner = Loud()
            self.parts = nn.ModuleDict({"axb": inner.up, key: inner.down, "0x": inner.norm, "last": inner.head})
            self.key = key

        def forward(self, x):
            parts = self.parts
            h = parts[self.key](torch.relu(parts["axb"](x)))
            return parts["last"](parts["0x"](h))

    def make():
        return Task(Named(), ADAM)

    run = adapt(make, batches=Lessons(10))
    assert run.moves == [(f"net.parts.{key}", "fp16", "bf16")]
    assert [name for name, format in run.formats.items() if format != "fp16"] == [f"net.parts.{key}"]
    module, _ = train(make, frozen := plugin_of(LEARNED), batches=Lessons(10))
    assert frozen.skipped_steps == 0
    assert resolved(frozen.policy, module) == resolved(run.plugin.policy, run.module)
