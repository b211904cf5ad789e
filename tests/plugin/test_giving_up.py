"""When the scale cannot fall any further, or every step is skipped, the error says where and what to try."""

import re
from functools import partial

import pytest
import torch
from known_results import INF, SGD, Line, Manual, fit, ours, slope, weights

from lightning_mixprec.errors import ScalingError
from lightning_mixprec.optim import loss_scaling as scaling

AT_MINIMUM = {"init_scale": 4.0, "min_scale": 1.0}
STATIC = dict.fromkeys(("init_scale", "min_scale", "max_scale"), 1024.0)


class TwoLayers(Line):
    """Only ``head`` ever has non-finite gradients."""

    def __init__(self):
        super().__init__()
        self.head = weights()

    def training_step(self, batch, batch_idx):
        return slope(self.layer, torch.full_like(batch, 0.5)) + slope(self.head, batch)


def test_an_overflow_at_the_minimum_is_an_error_that_says_where_and_what_to_try():
    model = TwoLayers()
    with pytest.raises(ScalingError) as error:
        fit(model, ours(loss_scaling=AT_MINIMUM), [0.5, *[INF] * 9])
    message = str(error.value)
    assert "\n" not in message
    assert "loss scale is at its minimum (1)" in message
    assert re.search(r"layers with non-finite gradients: head\.", message)
    assert all(f"({number})" in message for number in (1, 2, 3))
    assert model.travelled == 0.5


def test_the_minimum_itself_is_no_error_while_steps_are_taken():
    plugin = ours(loss_scaling=AT_MINIMUM)
    fit(Line(), plugin, [INF, INF, 0.5, 0.5])
    assert plugin.scaler.get_scale() == 1.0
    assert plugin.skipped_steps == 2


def test_at_the_minimum_one_warning_is_enough():
    plugin = ours(loss_scaling=AT_MINIMUM | {"at_min": "warn"})
    with pytest.warns(UserWarning, match="at its minimum") as caught:
        fit(Line(), plugin, [INF] * 9 + [0.5])
    assert sum("at its minimum" in str(warning.message) for warning in caught) == 1
    assert plugin.scaler.get_scale() == 1.0


@pytest.mark.parametrize(
    ("policy", "loss_scaling"),
    [("fp16", {"max_consecutive_skips": 3}), ("fp16", STATIC | {"max_consecutive_skips": 3}), ("bf16", False)],
    ids=["dynamic", "static", "guard"],
)
def test_too_many_skips_in_a_row_are_an_error_in_every_format(policy, loss_scaling):
    plugin = ours(policy, loss_scaling=loss_scaling)
    limit = 3 if loss_scaling else 100
    with pytest.raises(ScalingError, match=rf"{limit} optimizer steps in a row had non-finite gradients.*layer"):
        fit(Line(), plugin, [0.5] + [INF] * (limit + 1))
    assert plugin.skipped_steps == limit


def test_a_real_step_ends_the_row():
    plugin = ours(loss_scaling={"max_consecutive_skips": 3})
    fit(Line(), plugin, [INF, INF, 0.5] * 4)
    assert plugin.skipped_steps == 8


def two_steps(model, batch, _):
    for optimizer, layer, part in zip(model.optimizers(), (model.a, model.b), batch, strict=True):
        optimizer.zero_grad()
        model.manual_backward(slope(layer, part))
        optimizer.step()


def test_every_optimizer_has_its_own_row():
    plugin = ours(loss_scaling={"max_consecutive_skips": 3})
    with pytest.raises(ScalingError, match="gradients: b\\."):
        fit(Manual(two_steps), plugin, [(INF, 0.5), (0.5, INF), (0.5, INF), (0.5, INF), (0.5, 0.5)])
    assert plugin.skipped_steps == 4


def test_a_second_fit_begins_a_new_row():
    plugin = ours(loss_scaling={"max_consecutive_skips": 3})
    for values in ([0.5, INF, INF], [INF, INF, 0.5]):
        fit(Line(), plugin, values)
    assert plugin.skipped_steps == 4


def test_an_outcome_that_comes_in_late_gives_up_one_batch_later(monkeypatch):
    monkeypatch.setattr(scaling, "_is_read", lambda *_: False)
    plugin = ours(loss_scaling={"max_consecutive_skips": 3})
    model = Line(partial(SGD, fused=True))
    with pytest.raises(ScalingError, match="3 optimizer steps in a row"):
        fit(model, plugin, [0.5] + [INF] * 4)
    assert model.travelled == 0.5


def test_a_run_that_ends_in_hopeless_steps_ends_without_an_error_after_its_last_batch(monkeypatch):
    monkeypatch.setattr(scaling, "_is_read", lambda *_: False)
    plugin = ours(loss_scaling={"max_consecutive_skips": 3})
    fit(Line(partial(SGD, fused=True)), plugin, [0.5] + [INF] * 3)
    assert plugin.skipped_steps == 3


def test_sparse_layers_are_named():
    class Words(Line):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(3, 2, sparse=True)

        def training_step(self, batch, batch_idx):
            return slope(self.layer, batch * 0) + (self.table(torch.tensor([1, 1])) * batch[0, 0]).mean()

    with pytest.raises(ScalingError, match="gradients: table\\."):
        fit(Words(), ours(loss_scaling={"max_consecutive_skips": 1}), [3.0e38])


def test_compiled_layers_are_named_as_a_policy_names_them():
    model = Line()
    model.layer = torch.compile(model.layer, backend="eager")
    with pytest.raises(ScalingError, match="gradients: layer\\. Try"):
        fit(model, ours(loss_scaling={"max_consecutive_skips": 1}), [INF])
