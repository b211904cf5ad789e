"""When PrecisionScheduler takes a metric for one that no longer improves: as EarlyStopping does."""

import pytest
from lightnings import EarlyStopping
from plugin_models import (
    Batches,
    Evaluable,
    one_line,
    task,
    trainer,
)
from selection import slow_but_for

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler


class Noting(Evaluable):
    """Logs given values as a metric, one per epoch of training or one per validation."""

    values = (1.0,)
    where = "validation"

    def training_step(self, batch, batch_idx):
        if self.where == "training":
            self.log("metric", self.values[self.current_epoch], on_epoch=True, on_step=False, batch_size=4)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        if self.where == "validation" and not self.trainer.sanity_checking:
            self.log("metric", self.values[self.looks])
            self.looks += 1

    looks = 0


def noting(values, where, callback, epochs=8, **options):
    model = task(Noting)
    model.values, model.where = values, where.split()[0]
    if where == "training alone":
        options["limit_val_batches"] = 0
    run = trainer(PerLayerPrecision("fp32"), callbacks=[callback], max_epochs=epochs, **options)
    run.fit(model, Batches(6, count=2), Batches(6, count=1, seed=8))
    return run


SERIES = {
    "falling, then flat": ((5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0), "min", 0.0),
    "rising": ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), "min", 0.0),
    "rising is well": ((1.0, 2.0, 3.0, 2.9, 2.9, 3.1, 3.0, 3.0), "max", 0.0),
    "too little": ((5.0, 4.95, 4.9, 4.85, 4.8, 4.75, 4.7, 4.65), "min", 0.2),
}


@pytest.mark.parametrize("where", ["training", "training alone", "validation"])
@pytest.mark.parametrize("patience", slow_but_for({2}, [1, 2]))
@pytest.mark.parametrize(("values", "mode", "min_delta"), SERIES.values(), ids=SERIES)
def test_a_plateau_is_when_early_stopping_would_stop(values, mode, min_delta, patience, where):
    options = {"monitor": "metric", "mode": mode, "patience": patience, "min_delta": min_delta}
    stopping = EarlyStopping(**options)
    stopped = noting(values, where, stopping).global_step
    scheduler = PrecisionScheduler([{"at": {"event": "plateau", **options}, "policy": "bf16"}])
    noting(values, where, scheduler)
    assert [each["step"] for each in scheduler.came] == [stopped] * (stopped < 16)
    assert stopping.stopped_epoch > 0


def test_every_validation_is_a_look_where_there_are_several_in_an_epoch():
    values = (3.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    scheduler = PrecisionScheduler([{"at": {"event": "plateau", "monitor": "metric", "patience": 2}, "policy": "bf16"}])
    noting(values, "validation", scheduler, epochs=3, val_check_interval=1, num_sanity_val_steps=1)
    assert [(each["step"], each["epoch"]) for each in scheduler.came] == [(4, 2)]


def test_a_second_plateau_counts_from_the_first_on():
    at = {"event": "plateau", "monitor": "metric", "patience": 2}
    scheduler = PrecisionScheduler([{"at": at, "policy": "bf16"}, {"at": at, "policy": "fp32"}])
    noting((1.0,) * 8, "validation", scheduler)
    assert [(each["phase"], each["epoch"]) for each in scheduler.came] == [(1, 3), (2, 6)]


def test_a_metric_that_is_not_logged_is_an_error_at_the_first_look():
    scheduler = PrecisionScheduler([{"at": {"event": "plateau", "monitor": "metrik"}, "policy": "bf16"}])
    with pytest.raises(ValueError, match="phase 1: no metric 'metrik' is logged, did you mean metric") as caught:
        noting((1.0,) * 8, "training", scheduler)
    one_line(caught)
