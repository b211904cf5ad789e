"""AdaptivePrecision on compiled models: trials run uncompiled, and each move costs one graph."""

from pathlib import Path

import pytest
import torch._dynamo.config as dynamo
from adaptive_models import Lessons, Loud, Silent, encoded
from plugin_models import same
from selection import slow_but_for

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]

MODELS = {"loud": (Loud, lambda: Lessons(12)), "silent": (Silent, lambda: encoded(30))}


def adapted(run, model, how, **options):
    make, batches = MODELS[model]
    adaptive, plugin = AdaptivePrecision(), PerLayerPrecision("fp16")
    done = run(plugin, how, make=make, batches=batches(), callbacks=[adaptive], **options)
    return done, adaptive, Path("learned_policy.yaml").read_text()


def assert_as_plain(run, model, how, **options):
    plain, expected, learned = adapted(run, model, None)
    done, adaptive, learned_compiled = adapted(run, model, how, **options)
    assert adaptive.decisions == expected.decisions
    assert done.plugin.history == plain.plugin.history
    assert learned_compiled == learned
    assert same([*done.module.state_dict().values()], [*plain.module.state_dict().values()])
    changes = {entry["step"] for entry in done.plugin.history}
    assert changes
    assert list(done.compiled_at.values()) == [1] * (1 + len(changes))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the LightningModule", "the LightningModule in place", "a submodule in place"])
def test_a_compiled_run_adapts_as_the_plain_one_for_one_graph_per_assignment(how, run):
    assert_as_plain(run, "loud", how)


@pytest.mark.parametrize("model", slow_but_for({"loud"}, MODELS))
def test_trials_and_moves_are_not_what_dynamo_counts_as_endless_recompiling(model, run):
    with dynamo.patch(recompile_limit=1):
        assert_as_plain(run, model, "a submodule", options={"fullgraph": True})
