"""What a change of formats costs a compiled model: one graph per region for a new assignment, none for an old one."""

import pytest
import torch
import torch._dynamo.config as dynamo
from plugin_models import Call, ours, same
from selection import slow, slow_but_for
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_mixprec import PrecisionScheduler
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

REGIONS = {"each block": 2}
"""By how a model is compiled, its regions; else one."""


@pytest.mark.parametrize(
    ("policy", "graphs"),
    [
        ("bf16", 1),
        slow({"default": "bf16", "**.norm": "c=fp32,o=input"}, 1),
        slow({"default": "fp16", "**.norm": "p=fp64,c=fp32"}, 1),
        slow({"default": "fp32", "net.blocks": "p=fp64,c=bf16"}, 1),
        ({"default": "bf16", "net.blocks.[0:4].norm": "fp32", "net.blocks.3": "fp16"}, 3),
    ],
)
def test_blocks_that_compute_alike_are_one_graph_however_many_they_are(policy, graphs, run, net):
    """Dynamo compiles the forward of a class eight times at most."""
    done = run(policy, "each block", make=lambda: net(blocks=10), options={"fullgraph": True})
    assert done.compiled_at == {0: graphs}


def schedule(plugin, policies):
    """Each batch in the next of these policies."""
    return Call("on_train_batch_start", lambda trainer, _: plugin.set_policy(policies[trainer.global_step]))


A = {"default": "bf16", "net.blocks.0": "fp32"}
B = {"default": "bf16", "net.blocks.0": "fp32", "net.blocks.1.norm": "c=fp32,o=input"}
C = {"default": "fp16", "net.head": "fp32"}


def test_a_new_assignment_costs_one_graph_per_region_and_an_earlier_one_none(how, run):
    plugin = ours(A)
    done = run(plugin, how, callbacks=[schedule(plugin, [A, A, B, B, C, A, B, C])], max_epochs=2)
    assert set(done.compiled_at) <= {0, 2, 4}
    assert all(graphs <= REGIONS.get(how, 1) for graphs in done.compiled_at.values())
    assert done.graphs[-1] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("how", slow_but_for({"a submodule"}, ["the LightningModule", "a submodule", "each block"]))
def test_a_changing_run_has_the_numbers_of_the_plain_one(how, run):
    def changing(how):
        plugin = ours(A)
        return run(plugin, how, backend="aot_eager", callbacks=[schedule(plugin, [A, B, C, A])])

    assert same(changing(how).numbers, changing(None).numbers)


@pytest.mark.parametrize("how", slow_but_for({"each block"}, ["the LightningModule in place", "each block"]))
def test_phases_beyond_dynamos_limit_are_compiled_all_the_same(how, run):
    phases = [{"at": {"step": step}, "edit": edit} for step, edit in enumerate(EDITS, start=1)]
    with dynamo.patch(recompile_limit=2):
        # With fullgraph it is an error to exceed the limit.
        done = run("fp16", how, options={"fullgraph": True}, callbacks=[PrecisionScheduler(phases)])
        assert dynamo.recompile_limit == 2
    assert len(done.graphs) == 4
    assert all(batch in done.compiled_at for batch in (0, 1, 2, 3))


EDITS = ({"net.blocks.0.norm": "fp32"}, {"net.blocks.0.layer": "fp32"}, {"net.blocks.1": "bf16"})


@pytest.mark.parametrize(
    "edits",
    [
        {"0.norm": "fp32", "1.layer": "fp32", "2.norm": "fp16"},
        {"0": "fp32", "1": "fp16", "2": "c=fp32,o=bf16", "3": "fp64"},
    ],
    ids=["inside", "around"],
)
def test_blocks_in_more_formats_than_dynamos_limit_are_compiled_all_the_same(edits, run, net):
    policy = {"default": "bf16", **{f"net.blocks.{name}": value for name, value in edits.items()}}
    with dynamo.patch(recompile_limit=2):
        done = run(policy, "each block", make=lambda: net(blocks=4), options={"fullgraph": True})
    assert done.compiled_at == {0: 4}


class Counting(nn.Module):
    """Computes with a number that is another one each time."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + self.calls


def test_code_that_changes_by_itself_is_given_up_as_without_the_plugin(run):
    with dynamo.patch(recompile_limit=2, automatic_dynamic_shapes=False):
        mine, plain = (run(plugin, "a submodule", make=Counting) for plugin in ("bf16", None))
    assert mine.graphs == plain.graphs == [1, 2, 2, 2]


def test_evaluation_in_formats_of_its_own_costs_one_graph_in_all(run):
    plugin = ours("bf16", eval_policy="fp32")
    done = run(plugin, "a submodule", validates=True, max_epochs=3)
    assert done.compiled_at == {0: 1, 4: 1}
    assert done.counter.frame_count == 2


def test_formats_that_are_lent_run_uncompiled(how, run):
    plugin, tried = ours(A), PrecisionPolicy.from_dict({"default": "fp32", "net.head": "bf16"})

    def lend(trainer, module):
        for context in (plugin.trial_context(tried), plugin.reference_context()):
            with context:
                module.training_step(trainer.train_dataloader.batches[0], 0)

    lends = Call("on_train_batch_start", lend)
    assert run(plugin, how, callbacks=[lends]).compiled_at == run(A, how).compiled_at
    assert lends.calls == 4


@pytest.mark.parametrize("hand_on", [lambda x: (x, x), lambda x: [x], lambda x: {0: x}], ids=["tuple", "list", "dict"])
def test_a_compiled_layer_that_is_given_containers_is_compiled_once(hand_on):
    """They are others at each call: what tells them apart must not be compiled in."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, given):
            return self.layer(given[0])

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part = nn.Linear(4, 4), Part()

        def forward(self, x):
            return self.part(hand_on(self.stem(x)))

    torch.manual_seed(0)
    model, counter = Whole(), CompileCounterWithBackend("aot_eager")
    attachment = attach(model, as_policy({"default": "bf16", "part": "fp32"}).resolve(model), "cpu")
    x = torch.randn(2, 4)
    with attachment.context():
        plain = model(x)
    model.part.compile(backend=counter)
    for _ in range(4):
        with attachment.context():
            assert torch.equal(model(x), plain)
    assert counter.frame_count == 1
