"""The plugin in LightningCLI, in every form a user can write it."""

import contextlib
import io
from pathlib import Path

import pytest
import yaml
from capabilities import auto_format
from lightnings import LightningCLI, LightningModule
from plugin_models import Batches, Task, mlp
from selection import slow_but_for, slow_cases_but_for

from lightning_mixprec import LossScaling, PerLayerPrecision, PrecisionPolicy, Rule, optim

POLICY = {"default": "bf16", "net.6": "fp32"}
FULL = {"default": "bf16", "rules": [{"layers": "net.6", "compute": "fp32"}]}
RESOLVED = PrecisionPolicy("bf16", [Rule("net.6", compute="fp32")])

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_steps": 2,
}


class CliTask(Task):
    def __init__(self, width: int = 8) -> None:
        super().__init__(mlp())

    def train_dataloader(self):
        return Batches(6)


def run(*arguments: str, config: dict | None = None, **options) -> PerLayerPrecision:
    """Fits as ``python script.py fit ...`` does, with the config given as a file, and returns the plugin."""
    Path("policy.yaml").write_text(yaml.safe_dump(POLICY))
    Path("config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "trainer": {**QUIET, **(config or {})}}))
    return main("--config=config.yaml", *arguments, **options)


def main(*arguments: str, task: type[Task] = CliTask) -> PerLayerPrecision:
    with pytest.MonkeyPatch.context() as patch:
        # Lightning itself calls what jsonargparse is about to remove.
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        patch.setattr("sys.argv", ["script.py", "fit", *arguments])
        cli = LightningCLI(task, save_config_kwargs={"overwrite": True})
    assert cli.trainer.global_step == 2
    assert isinstance(cli.trainer.precision_plugin, PerLayerPrecision)
    return cli.trainer.precision_plugin


class Plain(CliTask):
    """Says nothing of its optimizer, and shows what it is trained with in the end."""

    configure_optimizers = LightningModule.configure_optimizers

    def on_train_end(self):
        optimizers = self.trainer.optimizers
        type(self).last_run = optimizers, [{**state} for each in optimizers for state in each.state.values()]


# The command line

BY_ARGUMENTS = {
    "no policy": ([], PrecisionPolicy(auto_format())),
    "auto": (["policy=auto"], PrecisionPolicy(auto_format())),
    "format": (["policy=fp16"], PrecisionPolicy("fp16")),
    "file": (["policy=policy.yaml"], RESOLVED),
    "short mapping": (["policy={default: bf16, net.6: fp32}"], RESOLVED),
    "short mapping as JSON": (['policy={"default": "bf16", "net.6": "fp32"}'], RESOLVED),
    "full mapping": (["policy={default: bf16, rules: [{layers: net.6, compute: fp32}]}"], RESOLVED),
}


@pytest.mark.parametrize(("arguments", "policy"), BY_ARGUMENTS.values(), ids=BY_ARGUMENTS)
def test_a_policy_on_the_command_line(arguments, policy):
    plugin = run("--trainer.plugins=PerLayerPrecision", *[f"--trainer.plugins.{argument}" for argument in arguments])
    assert plugin.policy == policy


def test_the_full_class_name_on_the_command_line():
    plugin = run("--trainer.plugins=lightning_mixprec.PerLayerPrecision", "--trainer.plugins.policy=policy.yaml")
    assert plugin.policy == RESOLVED


def test_every_other_argument_on_the_command_line():
    plugin = run(
        "--trainer.plugins=PerLayerPrecision",
        "--trainer.plugins.policy=fp16",
        "--trainer.plugins.skip_nonfinite=false",
        "--trainer.plugins.eval_policy=policy.yaml",
        "--trainer.plugins.on_policy_change=accept",
    )
    assert plugin.scaler.guards is False
    assert plugin._formats.evaluation == RESOLVED
    assert plugin._on_policy_change == "accept"


SCALING = {
    "auto": (["loss_scaling=auto"], LossScaling()),
    "off": (["loss_scaling=false"], None),
    "number": (["loss_scaling=1024"], LossScaling.static(1024)),
    "float": (["loss_scaling=0.5"], LossScaling.static(0.5)),
    "power": (["loss_scaling=1e3"], LossScaling.static(1000)),
    "mapping": (["loss_scaling={init_scale: 1024, growth_interval: 5}"], LossScaling(1024, growth_interval=5)),
    "one option": (["loss_scaling.init_scale=1024"], LossScaling(init_scale=1024)),
    "two options": (
        ["loss_scaling.init_scale=1024", "loss_scaling.growth_interval=5"],
        LossScaling(init_scale=1024, growth_interval=5),
    ),
}


@pytest.mark.parametrize(("arguments", "options"), slow_cases_but_for({"off", "number", "one option"}, SCALING))
def test_loss_scaling_on_the_command_line(arguments, options):
    given = [f"--trainer.plugins.{argument}" for argument in arguments]
    plugin = run("--trainer.plugins=PerLayerPrecision", "--trainer.plugins.policy=fp16", *given)
    assert plugin.scaler.options == options


# A config file

CLASS = "lightning_mixprec.PerLayerPrecision"
POLICY_CLASS = {
    "class_path": "lightning_mixprec.PrecisionPolicy",
    "init_args": {"default": "bf16", "rules": [{"layers": "net.6", "compute": "fp32"}]},
}
IN_A_FILE = {
    "format": ("fp16", PrecisionPolicy("fp16")),
    "auto": ("auto", PrecisionPolicy(auto_format())),
    "path": ("policy.yaml", RESOLVED),
    "short mapping": (POLICY, RESOLVED),
    "full mapping": (FULL, RESOLVED),
    "full mapping, all keys": ({**FULL, "allow_unmatched": False}, RESOLVED),
    "default alone": ({"default": "fp32"}, PrecisionPolicy("fp32")),
    "triple": (
        {"default": "bf16", "net.1": "c=fp32,o=input"},
        PrecisionPolicy("bf16", [Rule("net.1", compute="fp32", output="input")]),
    ),
    "globs": (
        {"default": "bf16", "rules": [{"layers": ["**.1", "net.[4:]"], "types": ["*Norm*", "Li*"], "compute": "fp32"}]},
        PrecisionPolicy("bf16", [Rule(["**.1", "net.[4:]"], ["*Norm*", "Li*"], compute="fp32")]),
    ),
    "class": (POLICY_CLASS, RESOLVED),
}  # fmt: skip


@pytest.mark.parametrize("form", slow_but_for({"list"}, ["mapping", "list"]))
@pytest.mark.parametrize(("policy", "expected"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_a_policy_in_a_config_file(policy, expected, form):
    entry = {"class_path": CLASS, "init_args": {"policy": policy}}
    assert run(config={"plugins": [entry] if form == "list" else entry}).policy == expected


ALONE = [{"class_path": CLASS}, [{"class_path": CLASS}], CLASS, [CLASS], {"class_path": "PerLayerPrecision"}]


@pytest.mark.parametrize("plugins", ALONE, ids=str)
def test_the_class_alone_in_a_config_file(plugins):
    assert run(config={"plugins": plugins}).policy == PrecisionPolicy(auto_format())


SCALING_IN_A_FILE = {
    "auto": ("auto", LossScaling()),
    "off": (False, None),
    "integer": (1024, LossScaling.static(1024)),
    "float": (0.5, LossScaling.static(0.5)),
    "mapping": ({"init_scale": 1024, "at_min": "warn"}, LossScaling(1024, at_min="warn")),
    "class": (
        {"class_path": "lightning_mixprec.LossScaling", "init_args": {"init_scale": 1024.0, "at_min": "warn"}},
        LossScaling(1024.0, at_min="warn"),
    ),
}


@pytest.mark.parametrize(("loss_scaling", "options"), SCALING_IN_A_FILE.values(), ids=SCALING_IN_A_FILE)
def test_loss_scaling_in_a_config_file(loss_scaling, options):
    arguments = {"policy": "fp16", "loss_scaling": loss_scaling}
    assert run(config={"plugins": {"class_path": CLASS, "init_args": arguments}}).scaler.options == options


def test_every_other_argument_in_a_config_file():
    arguments = {"eval_policy": POLICY, "skip_nonfinite": False, "on_policy_change": "checkpoint"}
    plugin = run(config={"plugins": {"class_path": CLASS, "init_args": arguments}})
    assert plugin._formats.evaluation == RESOLVED
    assert plugin.scaler.guards is False
    assert plugin._on_policy_change == "checkpoint"


def test_the_command_line_amends_the_config_file():
    config = {"plugins": {"class_path": CLASS, "init_args": {"policy": POLICY, "skip_nonfinite": False}}}
    plugin = run("--trainer.plugins.policy=fp16", "--trainer.plugins.loss_scaling=64", config=config)
    assert plugin.policy == PrecisionPolicy("fp16")
    assert plugin.scaler.get_scale() == 64
    assert plugin.scaler.guards is False


# The config that a run saves


SAVED = {
    "format": {"policy": "fp16", "loss_scaling": 1024},
    "path": {"policy": "policy.yaml", "eval_policy": "fp32"},
    "short mapping": {"policy": POLICY, "loss_scaling": {"init_scale": 1024.0}},
    "full mapping": {"policy": FULL, "loss_scaling": False},
    "class": {"policy": POLICY_CLASS},
}


@pytest.mark.parametrize("as_list", slow_but_for({True}, [False, True]), ids=["mapping", "list"])
@pytest.mark.parametrize("arguments", slow_cases_but_for({"format", "full mapping"}, SAVED))
def test_a_saved_config_runs_again(arguments, as_list):
    entry = {"class_path": CLASS, "init_args": arguments}
    # A log directory is what the config is saved to.
    config = {
        "plugins": [entry] if as_list else entry,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
    }
    first = run(config={**config, "log_every_n_steps": 1})
    [saved] = Path("lightning_logs").rglob("config.yaml")
    again = main(f"--config={saved}")
    assert again.policy == first.policy
    assert again._formats.evaluation == first._formats.evaluation
    assert again.scaler.options == first.scaler.options


def test_print_config_shows_what_runs():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        run("--print_config", config={"plugins": {"class_path": CLASS, "init_args": {"policy": POLICY}}})
    [arguments] = [yaml.safe_load(out.getvalue())["trainer"]["plugins"]["init_args"]]
    assert arguments["policy"] == POLICY
    assert arguments["skip_nonfinite"] is True


# What a typo says


WRONG = {
    "format": ({"policy": "bf61"}, "did you mean 'bf16'"),
    "file": ({"policy": "none.yaml"}, "the policy file none.yaml does not exist"),
    "rule": ({"policy": {"default": "bf16", "net.6": "fp23"}}, "did you mean 'fp32'"),
    "no default": ({"policy": {"net.6": "fp32"}}, "the policy has no default"),
    "key": ({"policy": {"default": "bf16", "rules": [{"layer": "net.6", "compute": "fp32"}]}}, "did you mean layers"),
    "scaling": ({"policy": "fp16", "loss_scaling": {"init_scael": 2}}, "unknown option 'init_scael'"),
    "scale": ({"policy": "fp16", "loss_scaling": -1}, "it has to be a positive"),
    "true": ({"policy": "fp16", "loss_scaling": True}, "loss_scaling is True"),
}


def complaint(capsys, *arguments, config=None):
    """What a user sees: jsonargparse complains and exits, or an exception ends the script."""
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(*arguments, config=config)
    return capsys.readouterr().err + str(caught.value)


@pytest.mark.parametrize("form", slow_but_for({"list"}, ["mapping", "list"]))
@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_a_config_file_shows_our_line(arguments, says, form, capsys):
    entry = {"class_path": CLASS, "init_args": arguments}
    assert says in complaint(capsys, config={"plugins": [entry] if form == "list" else entry})


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("policy=bf61", "did you mean 'bf16'"),
        ("policy=none.yaml", "the policy file none.yaml does not exist"),
        ("policy={default: bf16, net.6: fp23}", "did you mean 'fp32'"),
        ("loss_scaling=-1", "it has to be a positive"),
        ("loss_scaling=on", "loss_scaling is"),
        ("on_policy_change=rise", "raise"),
    ],
)
def test_a_mistake_on_the_command_line_shows_our_line(argument, says, capsys):
    assert says in complaint(capsys, "--trainer.plugins=PerLayerPrecision", f"--trainer.plugins.{argument}")


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_optimizer_for_weights_in_16_bits(name):
    plugin = run(
        f"--optimizer=lightning_mixprec.optim.{name}",
        "--optimizer.lr=0.01",
        "--optimizer.weights=kahan",
        "--optimizer.states=bf16",
        "--trainer.plugins=lightning_mixprec.PerLayerPrecision",
        "--trainer.plugins.policy={default: bf16, net.6: 'p=bf16'}",
        task=Plain,
    )
    assert plugin.policy.rules[0].param == "bf16"
    (optimizer,), states = Plain.last_run
    assert type(optimizer) is getattr(optim, name)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weights"], group["states"]) == (0.01, "kahan", "bf16")
    kept = [state["compensation"].shape for state in states if "compensation" in state]
    assert kept == [(2, 8), (2,)]
