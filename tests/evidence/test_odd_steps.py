"""Steps in every style that people write: a replay is the step, and monitors change no bit of the training."""

import json

import pytest
import torch
from diary import Diary
from known_results import ours as fp16_at_the_usual_scale
from lightnings import pl
from odd_steps import ODD_STEPS, Odd, adam, drawn, odd, plain, stepped_with
from plugin_models import Batches, ours, same, stock, trainer
from selection import slow_but_for

from lightning_mixprec import FidelityMonitor, OverflowMonitor, UnderflowMonitor
from lightning_mixprec.evidence.comparison import Comparison

PLUGINS = {"bf16": lambda: ours("bf16"), "stock bf16-mixed": lambda: stock("bf16")}
SEES_MOVED_WEIGHTS = {"optimizers in turn", "toggle_model"}
"""The second optimizer's gradients are of weights that the first has moved; a replay has those from before the step."""

pytestmark = pytest.mark.filterwarnings("ignore:.*past the precision plugin")


class Steps(pl.Callback):
    """Notes what every batch was stepped with."""

    def __init__(self, found):
        self.found, self.of_batches = found, []

    def on_train_batch_end(self, *_):
        self.of_batches.append(dict(self.found))
        self.found.clear()


def fit(name, plugin, callbacks=(), **options):
    torch.manual_seed(3)
    model = drawn(name) if isinstance(name, int) else odd(name)
    with stepped_with(model) as found:
        steps = Steps(found)
        run = trainer(plugin, callbacks=[*callbacks, steps], **options)
        run.fit(model, Batches(6))
    left = {
        "weights": model.state_dict(),
        "gradients": [param.grad for param in model.parameters()],
        "optimizers": [each.state_dict() for each in run.optimizers],
        "schedules": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "attributes": {name: vars(model).get(name) for name in ("rates", "batches")},
        "pulls": [vars(each).get("pulls") for each in run.optimizers],
        "random numbers": torch.get_rng_state(),
    }
    return left, steps.of_batches


def problems(folder):
    rows = [json.loads(line) for file in folder.rglob("mixprec.jsonl") for line in file.read_text().splitlines()]
    return [row["problem"] for row in rows if "problem" in row]


@pytest.fixture
def sampled(monkeypatch):
    """The gradients of every replay in the run's formats, by name."""
    seen, run_in = [], Comparison.run_in

    def noting(self, *args, **options):
        recorded = run_in(self, *args, **options)
        seen.append(recorded.replayed.gradients)
        return recorded

    monkeypatch.setattr(Comparison, "run_in", noting)
    return seen


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("name", ODD_STEPS)
def test_a_sample_has_the_gradients_that_the_step_is_taken_with(name, plugin, sampled, tmp_path):
    alone, _ = fit(name, PLUGINS[plugin]())
    monitors = [OverflowMonitor(), UnderflowMonitor(1), FidelityMonitor(1)]
    left, stepped = fit(name, PLUGINS[plugin](), monitors, default_root_dir=tmp_path)
    assert [part for part in alone if not same(alone[part], left[part])] == []
    assert problems(tmp_path) == []
    assert len(sampled) == len(stepped) == 4
    for sample, step in zip(sampled, stepped, strict=True):
        if name == "every second batch":
            assert sample.keys() == dict(odd(name).named_parameters()).keys()
            continue
        compared = [each for each in step if name not in SEES_MOVED_WEIGHTS or each.startswith("trunk")]
        assert sample.keys() == step.keys() and compared
        assert [each for each in compared if not torch.equal(sample[each], step[each])] == []


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("seed", slow_but_for(set(range(6)), range(40)))
def test_a_sample_of_a_drawn_step_has_its_gradients(seed, sampled, tmp_path):
    alone, _ = fit(seed, ours("bf16"))
    left, stepped = fit(seed, ours("bf16"), [UnderflowMonitor(1), FidelityMonitor(1)], default_root_dir=tmp_path)
    assert [part for part in alone if not same(alone[part], left[part])] == []
    assert problems(tmp_path) == [] and len(sampled) == len(stepped) == 4
    for sample, step in zip(sampled, stepped, strict=True):
        assert sample.keys() == step.keys()
        assert [each for each in step if not torch.equal(sample[each], step[each])] == []


def test_an_overflow_in_what_is_computed_of_gradients_is_the_scales():
    monitor = OverflowMonitor()
    fit("surgery in fp16", fp16_at_the_usual_scale("fp16"), [monitor])
    assert monitor.events and {event["verdict"] for event in monitor.events} == {"scale"}


def from_elsewhere(module, batch):
    plain(module, batch)
    ELSEWHERE[0].step()


ELSEWHERE = []


def test_an_optimizer_that_the_replay_knows_nothing_of_is_refused_and_moves_nothing(tmp_path):
    def configure(module):
        ELSEWHERE[:] = [adam(module)]
        return adam(module)

    def run(*monitors):
        torch.manual_seed(3)
        model = Odd(from_elsewhere, configure)
        trainer(ours("bf16"), callbacks=list(monitors), default_root_dir=tmp_path).fit(model, Batches(6))
        return model.state_dict()

    alone = run()
    with pytest.warns(UserWarning, match=r"step 0.*takes? the optimizer from self.optimizers\(\)"):
        watched = run(FidelityMonitor(1))
    assert same(alone, watched)
    assert len(problems(tmp_path)) == 4 and all("the run's Adam" in problem for problem in problems(tmp_path))


RATES = Diary()


def noting_rates(module, batch):
    RATES.append(module.trainer.optimizers[0].param_groups[0]["lr"])
    return ODD_STEPS["rates by hand"][0](module, batch)


def test_a_learning_rate_that_a_replay_writes_is_the_copys():
    RATES.clear()
    trainer(ours("bf16"), callbacks=[FidelityMonitor(1)]).fit(Odd(noting_rates, adam), Batches(6))
    assert len(RATES) == 3 * 4  # each step runs in the run's formats, in fp32, and then truly
    assert all(len(set(RATES[at : at + 3])) == 1 for at in range(0, 12, 3)) and len(set(RATES)) == 4


def test_losses_that_are_kept_over_batches_go_backward_together():
    """A replay that went backward through them would free the graph of the steps before."""

    def of_three(module, batch):
        module.kept.append(module.loss(batch))
        if len(module.kept) == 3:
            optimizer = module.optimizers()
            optimizer.zero_grad()
            module.manual_backward(torch.stack(module.kept).sum())
            optimizer.step()
            module.kept.clear()

    def run(callbacks):
        module = Odd(of_three, adam)
        module.kept = []
        torch.manual_seed(1)
        trainer(ours("bf16"), callbacks=callbacks, max_steps=2).fit(module, Batches(6))
        return module.state_dict()

    assert same(run([]), run([FidelityMonitor(1)]))
