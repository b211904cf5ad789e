"""Generated modules with odd habits train with a monitor as without one, and are told in one line what they left.

``MIXPREC_ODD_MODULES=1000 pytest -m "" tests/properties/test_odd_modules.py`` draws a thousand.
"""

import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightnings import pl
from odd_modules import HABITS, REAL, REFUSED, WIDTH, OddModel
from plugin_models import ours, same, stock

from lightning_mixprec import FidelityMonitor, UnderflowMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
PLUGINS = {"bf16": lambda: ours("bf16"), "stock": lambda: stock("bf16"), "fp32": lambda: ours("fp32")}
TOLD = "no further step of this run is replayed"
DRAWN = int(os.environ.get("MIXPREC_ODD_MODULES", "30"))


def fit(names, plugin, callbacks):
    """What training comes to, and the warnings that say that a step could not be sampled."""
    REAL.clear()
    model = OddModel(names)
    torch.manual_seed(2)
    data = torch.randn(5, 8, WIDTH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=5, plugins=PLUGINS[plugin](), callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    optimizer = trainer.optimizers[0].state_dict()
    told = [str(each.message) for each in caught if "could not sample" in str(each.message)]
    return (model.losses, model.state_dict(), hooks, optimizer, torch.get_rng_state()), told


def check(names, plugin="bf16", room=None):
    """Trains with a monitor and without."""
    with pytest.MonkeyPatch.context() as patch:
        if room is not None:
            patch.setattr("lightning_mixprec.evidence.instruments.restoring.contents._MOST_BYTES", room)
        alone, _ = fit(names, plugin, [])
        watched, told = fit(names, plugin, [UnderflowMonitor(2) if plugin == "stock" else FidelityMonitor(2)])
    assert same(alone, watched)
    assert len(told) <= 1
    assert all(TOLD in line and "\n" not in line for line in told)
    assert told or not REFUSED & set(names)
    return told


@pytest.mark.parametrize("name", sorted(HABITS))
def test_a_habit_is_no_matter(name):
    told = check([name])
    assert bool(told) == (name in REFUSED | {"WeightsElsewhere"})


def test_a_weight_that_gets_another_name_in_the_step_ends_no_run():
    check(["ParametrizedInForward"], "stock")


@pytest.mark.parametrize(("name", "is_told"), [("WritesPastAutograd", False), ("ArrayOfItsOwn", True)])
def test_where_little_is_copied_tensors_are_put_back_and_arrays_refused(name, is_told):
    assert bool(check([name], room=64)) == is_told


@settings(max_examples=min(DRAWN, 10))
@given(
    names=st.lists(st.sampled_from(sorted(HABITS)), min_size=2, max_size=5),
    plugin=st.sampled_from(sorted(PLUGINS)),
    room=st.sampled_from([None, 64]),
)
def test_any_few_habits_together_are_no_matter(names, plugin, room):
    """Ten models, each trained twice: takes some seconds."""
    check(names, plugin, room)


@pytest.mark.slow
@settings(max_examples=DRAWN)
@given(
    names=st.lists(st.sampled_from(sorted(HABITS)), min_size=1, max_size=8),
    plugin=st.sampled_from(sorted(PLUGINS)),
    room=st.sampled_from([None, 64]),
)
def test_many_models_of_any_habits(names, plugin, room):
    check(names, plugin, room)
