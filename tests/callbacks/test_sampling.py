"""Replaying steps changes nothing: not the training to its last bit, and nothing that is left on the model."""

import json
from pathlib import Path

import pytest
import torch
from diary import Diary
from lightnings import pl
from observed_models import MODULES, NETS, PLUGINS, Busy, monitors, plain, trace
from plugin_models import Batches, Call, Task, fit, ours, same, snapshot
from selection import slow_but_for
from torch import nn

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, PrecisionReport, UnderflowMonitor
from lightning_mixprec.evidence import findings
from lightning_mixprec.evidence.instruments.probe import Observer
from lightning_mixprec.evidence.replay import StepReplay

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(vanish in|no longer points|differs from fp32)"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]


def differences(first, second):
    return [key for key in first if not same(first[key], second[key])]


def assert_unchanged(make, plugin, **options):
    alone = trace(make, PLUGINS[plugin](), **options)
    watched = monitors()
    assert differences(alone, trace(make, PLUGINS[plugin](), watched, **options)) == []
    for monitor in watched:
        assert monitor.latest.get("layers", monitor.latest)


# The training


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_run_is_the_same_to_the_last_bit_under(plugin):
    assert_unchanged(lambda: Busy(plain()), plugin)


@pytest.mark.parametrize("plugin", slow_but_for({"mixed"}, ["mixed", "stock bf16-mixed"]))
@pytest.mark.parametrize("net", NETS)
def test_a_run_is_the_same_to_the_last_bit_with(net, plugin):
    assert_unchanged(lambda: Busy(NETS[net]()), plugin)


@pytest.mark.parametrize("plugin", slow_but_for({"fp16"}, ["fp16", "stock 16-mixed"]))
@pytest.mark.parametrize("module", MODULES)
def test_a_run_is_the_same_to_the_last_bit_for_a_module_with(module, plugin):
    assert_unchanged(MODULES[module], plugin)


OPTIONS = {
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.1},
    "several epochs": {"max_epochs": 2},
}


@pytest.mark.parametrize("plugin", slow_but_for({"mixed"}, ["mixed", "stock 16-mixed"]))
@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_is_the_same_to_the_last_bit_under_the_option(options, plugin):
    assert_unchanged(lambda: Busy(plain()), plugin, **OPTIONS[options])


class Graphs:
    """A compiler that leaves graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compiled(how, backend):
    module = Busy(plain())
    if how == "a compiled submodule":
        module.net = torch.compile(module.net, backend=backend)
    elif how == "a submodule compiled in place":
        module.net[4].compile(backend=backend)
    else:
        module.compile(backend=backend)
    return module


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("policy", [{"default": "bf16", "net.4": "fp32"}, "fp16"])
@pytest.mark.parametrize(
    "how", slow_but_for({"a compiled submodule"}, ["a compiled submodule", "a submodule compiled in place"])
)
def test_nothing_is_compiled_again_because_of_a_replay_with(how, policy):
    torch._dynamo.reset()
    traces, graphs = [], [Graphs(), Graphs()]
    for backend, watching in zip(graphs, ([], monitors()), strict=True):
        traces.append(trace(lambda b=backend: compiled(how, b), ours(policy), watching))
        torch._dynamo.reset()
    assert differences(*traces) == []
    assert graphs[0].count == graphs[1].count
    # torch 2.11 leaves a lone module of its own as it is.
    leaves_it = torch.__version__ < "2.12" and (how, policy) == ("a submodule compiled in place", "fp16")
    assert leaves_it or graphs[0].count > 0


# What is left behind


class Snapshots(pl.Callback):
    def __init__(self):
        self.taken, self.hooked = [], []

    def on_before_zero_grad(self, trainer, module, optimizer):  # inside the step, after on_train_batch_start
        self.taken.append(snapshot(module.net))
        self.hooked.append(any(each._forward_hooks or each._forward_pre_hooks for each in module.net.modules()))


@pytest.mark.parametrize("policy", ["fp16", {"default": "fp16", "net.1": "c=fp32,o=input"}])
def test_modules_are_left_as_they_were(policy):
    alone, watched = Snapshots(), Snapshots()
    fit(Task(plain()), ours(policy), callbacks=[alone])
    fit(Task(plain()), ours(policy), callbacks=[UnderflowMonitor(2), FidelityMonitor(2), watched])
    assert len(watched.taken) == 4
    assert all(taken == watched.taken[0] for taken in watched.taken)
    assert watched.hooked == alone.hooked


def test_an_unsampled_step_replays_and_observes_nothing(monkeypatch):
    counted = count(monkeypatch)
    fit(Task(plain()), ours("fp16"), batches=Batches(6, count=5), callbacks=[UnderflowMonitor(4)])
    assert counted == {"reference": 2, "low": 0, "observers": 2}


def count(monkeypatch):
    counted = {"reference": 0, "low": 0, "observers": 0}
    opened, begin = StepReplay.opened, Observer.__enter__

    def counting(self, *, reference=False):
        counted["reference" if reference else "low"] += 1
        return opened(self, reference=reference)

    def observing(self):
        counted["observers"] += 1
        return begin(self)

    monkeypatch.setattr(StepReplay, "opened", counting)
    monkeypatch.setattr(Observer, "__enter__", observing)
    return counted


# Who samples when


def sampled(monitor):
    rows = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["monitor"] == monitor._NAME and "stagnation_rate" not in row]
    return list(dict.fromkeys(row["batch_idx"] for row in mine))


def test_monitors_that_are_due_together_share_a_replay(monkeypatch):
    counted = count(monkeypatch)
    fit(Task(plain()), ours("fp16"), callbacks=monitors())
    assert counted == {"reference": 4, "low": 4, "observers": 4}


@pytest.mark.parametrize("underflow_first", [True, False])
def test_each_monitor_samples_its_own_steps(underflow_first):
    watching = [UnderflowMonitor(3), FidelityMonitor(4)]
    fit(Task(plain()), ours("fp16"), batches=Batches(6, count=10), callbacks=watching[:: 1 if underflow_first else -1])
    assert sampled(watching[0]) == [0, 3, 6, 9]
    assert sampled(watching[1]) == [0, 4, 8]


def test_findings_are_there_when_the_batch_ends():
    fidelity, seen = FidelityMonitor(1), []
    look = Call("on_train_batch_end", lambda run, model: seen.append(run.callback_metrics["mixprec/loss_gap"].item()))
    fit(Task(plain()), ours("fp16"), callbacks=[fidelity, look])
    assert len(set(seen)) == 4
    assert seen[-1] == pytest.approx(fidelity.latest["loss_gap"])


# What goes wrong in a replay does not reach the run


class Fragile(Task):
    """Fails while it is replayed: always, or on batches of more than two."""

    def __init__(self, error, limit=0):
        super().__init__(plain())
        self.error, self.limit, self.sizes = error, limit, []

    def training_step(self, batch, batch_idx):
        if vars(self).get("log") is not None:  # a replay replaces it
            NOTED.append(len(batch[0]))
            if len(batch[0]) > self.limit:
                raise self.error
        return super().training_step(batch, batch_idx)


NOTED = Diary()


def rows_of(**what):
    rows = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    return [row for row in rows if all(row.get(key) == value for key, value in what.items())]


@pytest.fixture(autouse=True)
def _nothing_noted():
    NOTED.clear()


@pytest.mark.parametrize("monitor", [UnderflowMonitor, FidelityMonitor])
def test_what_does_not_fit_into_memory_is_tried_on_half_of_the_batch(monitor):
    watching = monitor(4)
    fit(Fragile(torch.OutOfMemoryError("CUDA out of memory."), limit=2), ours("fp16"), callbacks=[watching])
    assert NOTED[:2] == [4, 2]
    assert watching.latest.get("layers", watching.latest)
    assert [row["is_sampled"] for row in rows_of(problem="OutOfMemoryError: CUDA out of memory.")] == [True]


@pytest.mark.parametrize(
    ("error", "attempts"), [(torch.OutOfMemoryError("CUDA out of memory."), [4, 2]), (KeyError("teacher"), [4])]
)
@pytest.mark.parametrize("monitor", [UnderflowMonitor, FidelityMonitor])
def test_a_replay_that_fails_costs_a_row_and_one_warning(monitor, error, attempts):
    said = f"{monitor.__name__} could not sample step 0 .*(out of memory|teacher).*training goes on"
    with pytest.warns(UserWarning, match=said) as caught:
        run = fit(Fragile(error), ours("fp16"), callbacks=[monitor(2)])
    assert len([each for each in caught if "could not sample" in str(each.message)]) == 1
    assert run.global_step == 4
    assert attempts * 2 == NOTED
    rows = [row for row in rows_of() if "problem" in row]
    assert [(row["step"], row["is_sampled"]) for row in rows] == [(0, False), (2, False)]


def test_a_reason_is_told_once_and_the_summaries_say_how_many_failed(capsys):
    watched = [UnderflowMonitor(2), FidelityMonitor(2), AdaptivePrecision(every_n_steps=2)]
    with pytest.warns(UserWarning, match=r"could not .*teacher") as caught:
        fit(Fragile(KeyError("teacher")), ours("fp16"), callbacks=watched)
    assert len([each for each in caught if "could not" in str(each.message)]) == 1
    said = capsys.readouterr().out
    assert said.count("no step was sampled: of 2 that were tried none could be (KeyError: 'teacher')") == 2
    assert "AdaptivePrecision: 0 moves" in said and "; 0 of " in said and "steps could be looked at" in said


def test_monitors_that_share_a_sample_share_the_line():
    with pytest.warns(UserWarning, match="^UnderflowMonitor, FidelityMonitor could not sample step 0 .*run twice"):
        fit(Fragile(KeyError("teacher")), ours("fp16"), callbacks=[UnderflowMonitor(2), FidelityMonitor(4)])


def test_a_summary_says_how_many_of_how_many(capsys):
    class Failing(Task):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1 and FAILS[0]:
                FAILS[0] -= 1
                raise KeyError("planted")
            return super().training_step(batch, batch_idx)

    FAILS[0] = 1
    with pytest.warns(UserWarning, match="could not sample step 1"):
        fit(Failing(plain()), ours("fp16"), callbacks=[FidelityMonitor(1)])
    assert "; 3 of 4 steps could be sampled" in capsys.readouterr().out


FAILS = Diary([0])


def test_what_fails_in_a_replay_leaves_the_run_as_it_was():
    alone = trace(lambda: Fragile(KeyError("x"), limit=9), ours("fp16"))
    with pytest.warns(UserWarning, match="could not sample"):
        watched = trace(lambda: Fragile(KeyError("x")), ours("fp16"), monitors())
    assert differences(alone, watched) == []


class Iterating(Task):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter. step flavor")
@pytest.mark.filterwarnings("ignore:Found .dataloader_iter. argument")
@pytest.mark.parametrize("monitor", [UnderflowMonitor, FidelityMonitor])
def test_a_step_that_takes_an_iterator_is_not_sampled_and_told_so_once(monitor):
    with pytest.warns(UserWarning, match=f"{monitor.__name__} needs batches.*dataloader_iter") as caught:
        run = fit(Iterating(plain()), ours("fp16"), callbacks=[monitor(1)])
    assert len([each for each in caught if "needs batches" in str(each.message)]) == 1
    assert run.global_step == 4


class OnGraphs(Task):
    """Regression on batches that hold tensors of which no half can be taken."""

    def training_step(self, batch, batch_idx):
        x, y, adjacency, ragged = batch
        return super().training_step((torch.sparse.mm(adjacency, x) + ragged.values().sum(), y), batch_idx)


@pytest.mark.parametrize("monitor", [UnderflowMonitor, FidelityMonitor])
def test_batches_may_hold_tensors_that_cannot_be_halved(monitor):
    watching, batches = monitor(1), Batches(6)
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    batches.batches = [(*each, torch.eye(4).to_sparse(), ragged) for each in batches.batches]
    fit(OnGraphs(plain()), ours("fp32"), callbacks=[watching], batches=batches)
    assert rows_of(monitor="underflow" if monitor is UnderflowMonitor else "fidelity")
    assert not [row for row in rows_of() if "problem" in row]


def test_lazy_parameters_are_a_problem_of_the_monitor_alone():
    lazy = Task(nn.Sequential(nn.LazyLinear(2)))
    lazy.configure_optimizers = lambda: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.warns(UserWarning, match="lazy parameters"):
        fit(lazy, ours("bf16"), callbacks=[UnderflowMonitor(1)])


# Resuming


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("batch", [2, None], ids=["inside an epoch", "between epochs"])
def test_a_resumed_run_samples_what_the_uninterrupted_one_samples(batch):
    def run(monitor, ckpt_path=None, save=None, epochs=2):
        torch.manual_seed(3)
        task = Task(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
        Path("mixprec.jsonl").unlink(missing_ok=True)
        saving = [Call(*save)] if save else []
        run = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, plugins=ours("fp16"), callbacks=[*monitor, *saving], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        run.fit(task, Batches(6, count=5), ckpt_path=ckpt_path)
        return [(row["monitor"], row["epoch"], row["batch_idx"], row.get("layer")) for row in rows_of()]

    def save(trainer, model):
        at = trainer.fit_loop.epoch_loop.batch_idx
        if trainer.current_epoch == 0 and (batch is None or at == batch):
            trainer.save_checkpoint("run.ckpt")

    hook = "on_train_epoch_end" if batch is None else "on_train_batch_end"
    whole = [UnderflowMonitor(3), FidelityMonitor(2, layers_per_sample=1)]
    rows = run(whole, save=(hook, save))
    resumed = [UnderflowMonitor(3), FidelityMonitor(2, layers_per_sample=1)]
    later = run(resumed, ckpt_path="run.ckpt")
    assert later == rows[-len(later) :]
    assert {row[:3] for row in later} == {row[:3] for row in rows if row[1:3] > (0, 4 if batch is None else batch)}
    for one, other in zip(whole, resumed, strict=True):
        # Lightning starts a loader over that cannot be resumed inside an epoch: other data.
        assert (one.state_dict() == other.state_dict()) is (batch is None)


def test_what_is_told_of_a_layer_is_found_out_once_for_all_monitors(monkeypatch, tmp_path):
    asked = []
    losses = findings._losses
    monkeypatch.setattr(findings, "_losses", lambda *args: asked.append(args) or losses(*args))

    def fitted(*watched):
        asked.clear()
        here = {"callbacks": list(watched), "default_root_dir": tmp_path}
        fit(Task(nn.Linear(6, 2)), ours("fp16"), Batches(6, count=1), **here)
        return len(asked)

    assert 0 < fitted(UnderflowMonitor()) == fitted(UnderflowMonitor(), PrecisionReport())


class Pictures(Task):
    """Writes into its logger's folder, and asks the logger what it is."""

    def training_step(self, batch, batch_idx):
        logger = self.logger
        assert (
            isinstance(logger, pl.loggers.CSVLogger)
            and self.trainer.log_dir == logger.log_dir
            and logger.name == "runs"
        )
        folder = Path(logger.log_dir, "pictures")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(batch[0], folder / f"{batch_idx}.pt")
        logger.experiment.log_metrics({"planted": 1.0}, self.global_step)
        logger.log_metrics({"planted too": 1.0}, self.global_step)
        return super().training_step(batch, batch_idx)


def test_a_step_may_ask_its_logger_for_its_folder_and_logs_nothing_in_a_replay(tmp_path, monkeypatch):
    logged, writer = Diary(), pl.loggers.csv_logs.ExperimentWriter
    monkeypatch.setattr(writer, "log_metrics", lambda self, metrics, step=None: logged.append(set(metrics)))
    monitor = FidelityMonitor(1)
    fit(Pictures(plain()), ours("bf16"), callbacks=[monitor], logger=pl.loggers.CSVLogger(tmp_path, "runs"))
    assert monitor.latest["layers"]
    assert logged.count({"planted"}) == logged.count({"planted too"}) == 4
