"""Layers are named as they are without torch.compile: in rules, errors, histories and learned policies."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.compile import to_uncompiled
from plugin_models import Call, one_line, ours, same, save, snapshot, stock
from selection import slow_but_for

from lightning_mixprec.errors import PolicyError

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

POLICY = {"default": "bf16", "net.blocks.[0:1]": "fp32", "**.norm": "c=fp32,o=input", "re:net\\.head": "fp32"}


def test_rules_mean_what_they_mean_for_the_plain_model(how, run):
    plain, compiled = run(POLICY, max_steps=1), run(POLICY, how, max_steps=1)
    assert compiled.plugin.assignment == plain.plugin.assignment
    assert compiled.plugin.assignment["net.head"].compute == "fp32"


@pytest.mark.parametrize("pattern", ["net._orig_mod.head", "_orig_mod.net.head", "re:net\\._orig_mod\\.head"])
def test_a_rule_with_a_compilers_name_in_it_is_told_what_to_write(pattern, run):
    with pytest.raises(PolicyError, match=r"matches no layer of Regression; did you mean net\.head\?") as caught:
        run({"default": "bf16", pattern: "fp32"}, "a submodule")
    one_line(caught)


@pytest.mark.parametrize("how", slow_but_for({"a submodule"}, ["the LightningModule", "a submodule", "each block"]))
def test_a_change_is_in_the_history_under_the_plain_name(how, run):
    plugin = ours(POLICY)
    move = Call("on_train_batch_end", lambda *_: plugin.edit_policy({"net.head": "bf16"}), at=0)
    run(plugin, how, callbacks=[move])
    assert [(entry["layer"], entry["from"], entry["to"]) for entry in plugin.history] == [("net.head", "fp32", "bf16")]


def test_the_keys_of_a_checkpoint_are_those_of_a_stock_run(how, run):
    mine, theirs = run(POLICY, how, max_steps=1), run(stock("bf16"), how, max_steps=1)
    keys = [[*done.module.state_dict()] for done in (mine, theirs)]
    assert keys[0] == keys[1]
    assert any("_orig_mod" in key for key in keys[0]) is (how == "a submodule")


def test_what_was_moved_is_still_moved_when_the_run_is_resumed_uncompiled(run):
    plugin, resumed = ours(POLICY), ours(POLICY)
    move = Call("on_train_batch_end", lambda *_: plugin.edit_policy({"net.head": "bf16"}), at=0)
    run(plugin, "a submodule in place", callbacks=[move, save()])
    done = run(resumed, ckpt_path="run.ckpt", max_epochs=2)
    assert len(done.losses) == 4
    assert resumed.assignment["net.head"].compute == "bf16"
    assert resumed.history == plugin.history != []


class Before(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        self.taken = snapshot(pl_module)


@pytest.mark.parametrize("how", slow_but_for({"a submodule"}, ["the LightningModule", "a submodule", "each block"]))
def test_nothing_is_left_on_a_compiled_module(how, run):
    before = Before()
    done = run(POLICY, how, callbacks=[before], max_steps=1)
    own = [{name: of.get("forward") for name, of in taken.items()} for taken in (snapshot(done.module), before.taken)]
    assert own[0] == own[1]


def test_a_module_can_be_uncompiled_after_the_run(run):
    plain, done = run(POLICY), run(POLICY, "the LightningModule")
    x = torch.randn(4, 6)
    module = to_uncompiled(done.module)
    assert all("forward" not in vars(part) for part in module.net.modules())
    assert same(module.net(x), plain.module.net(x))
