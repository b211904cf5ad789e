"""``MixPrecCLI``: Lightning's subcommands as they are, and plan, compare and export with the config of a fit."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import pytorch_lightning as other
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_mixprec import MixPrecCLI, MixPrecError, PerLayerPrecision, PrecisionPlan, PrecisionPolicy

CONFIG = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
        "callbacks": [
            {"class_path": "lightning_mixprec.OverflowMonitor"},
            {"class_path": "ModelCheckpoint", "init_args": {"filename": "last"}},
        ],
        "plugins": {
            "class_path": "lightning_mixprec.PerLayerPrecision",
            "init_args": {"policy": {"default": "bf16", "net.2": "fp32"}, "emulate": False},
        },
    },
    "model": {"width": 8},
}


class Net(pl.LightningModule):
    def __init__(self, width: int = 4, inputs: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        if inputs is not None:
            self.example_input_array = torch.ones(inputs, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.size = size

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(3, (self.size,), generator=generator)
        self.data = TensorDataset(torch.randn(self.size, 4, generator=generator), labels)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=6)

    val_dataloader = train_dataloader


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command line in an empty folder, with the config there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(*arguments, model=Net, data=Data, cli=MixPrecCLI, **options):
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        return cli(model, data, auto_configure_optimizers=False, **options)

    return run


pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def version(number):
    return Path("lightning_logs") / f"version_{number}"


def test_fit_is_lightnings_own(run):
    cli = run("fit", "--config=config.yaml")
    assert type(cli.trainer) is pl.Trainer and cli.trainer.global_step == 4
    assert isinstance(cli.trainer.precision_plugin, PerLayerPrecision)
    assert (version(0) / "config.yaml").is_file()


def test_plan_writes_a_plan_and_its_policy(run, capsys):
    run("plan", "--config=config.yaml", "--budget={low_precision_share: 0.3}", "--batches=2")
    plan = PrecisionPlan.from_file(version(0) / "plan.json")
    policy = PrecisionPolicy.from_file(version(0) / "plan_policy.yaml")
    assert policy.to_dict() == plan.policy.to_dict()
    assert plan.budget == {"low_precision_share": 0.3} and plan.predicted.low_precision_share >= 0.3
    out = capsys.readouterr().out
    assert str(version(0) / "plan.json") in out and "net.0" in out
    assert not (version(0) / "checkpoints").exists() and not (version(0) / "mixprec.jsonl").exists()
    assert (version(0) / "config.yaml").is_file()  # what the plan was made with


def test_a_planned_policy_is_trained_with(run):
    run("plan", "--config=config.yaml", "--batches=1", "--output=here")
    cli = run("fit", "--config=config.yaml", "--trainer.plugins.policy=here/plan_policy.yaml")
    assert cli.trainer.precision_plugin.configured_policy == PrecisionPolicy.from_file("here/plan_policy.yaml")


def test_compare_runs_the_configs_policy_and_others(run, capsys):
    run("compare", "--config=config.yaml", "--batches=3", "--tolerance=1.0")
    told = json.loads((version(0) / "comparison.json").read_text())
    [row] = told["rows"]
    assert row["policy"] == "config" and abs(row["loss_gap"]) < 0.1
    assert (told["step"], told["batches"]) == ("validation_step", 3) and row["val_loss"] == pytest.approx(row["loss"])
    assert "within 1: config" in capsys.readouterr().out
    run("compare", "--config=config.yaml", "--batches=3", "--policies={all: bf16, wide: fp32}", "--output=told.json")
    rows = {row["policy"]: row for row in json.loads(Path("told.json").read_text())["rows"]}
    assert list(rows) == ["all", "wide"]
    assert rows["wide"]["loss_gap"] == 0 < abs(rows["all"]["loss_gap"])


def test_export_writes_the_configs_policy_with_the_weights_of_a_checkpoint(run, capsys):
    trained = run("fit", "--config=config.yaml").model
    checkpoint = next(version(0).glob("checkpoints/*.ckpt"))
    run("export", "--config=config.yaml", f"--ckpt_path={checkpoint}")
    program = torch.export.load(version(1) / "model.pt2").module()
    batch = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = trained.net[1](trained.net[0](batch))
    assert torch.equal(program(batch), trained.net[2](hidden.float()))
    assert "in bf16" in capsys.readouterr().out


def test_export_of_weights_goes_where_it_is_said(run):
    run("export", "--config=config.yaml", "--format=weights", "--output=out/half.pt")
    weights = torch.load("out/half.pt", weights_only=True)
    assert (weights["net.0.weight"].dtype, weights["net.2.weight"].dtype) == (torch.bfloat16, torch.float32)


def test_example_inputs_are_the_modules_own_if_it_has_some(run):
    run("export", "--config=config.yaml", "--model.inputs=2", "--output=two.pt2")
    [shape] = [
        node.meta["val"].shape
        for node in torch.export.load("two.pt2").graph.nodes
        if node.op == "placeholder" and node.meta["val"].shape[-1:] == (4,) and node.meta["val"].dim() == 2
        and "weight" not in node.name
    ]  # fmt: skip
    assert shape == (2, 4)


@pytest.mark.parametrize("command", ["plan", "compare", "export"])
def test_help_and_config_are_printed(run, capsys, command):
    for option in ("--help", "--print_config"):
        with pytest.raises(SystemExit) as ended:
            run(command, "--config=config.yaml", option)
        assert ended.value.code == 0
    assert "ckpt_path" in capsys.readouterr().out


class Odd(Net):
    def forward(self, one, two, three):
        return one

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()


class Headless(pl.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Linear(4, width)

    training_step = validation_step = Odd.training_step
    configure_optimizers = Net.configure_optimizers


MISTAKES = {
    "no forward": (["export"], Headless, "Headless has no forward, which is what is exported"),
    "another forward": (["export"], Odd, "forward of Odd takes (one, two, three)"),
    "budget": (["plan", "--budget={tme: 0.5}"], Net, "budget has the key 'tme'"),
    "device": (["plan", "--device=h1000"], Net, "did you mean 'h100'?"),
    "policy": (["compare", "--policies={a: bf17}"], Net, "did you mean 'bf16'?"),
    "checkpoint": (["compare", "--ckpt_path=none.ckpt"], Net, "cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line(run, capsys, mistake):
    (command, *arguments), model, says = MISTAKES[mistake]
    with pytest.raises(SystemExit) as ended:
        run(command, "--config=config.yaml", *arguments, model=model)
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line


def test_a_function_is_no_trainer_class(run):
    with pytest.raises(MixPrecError, match="trainer_class 'make', a function"):
        run("fit", "--config=config.yaml", trainer_class=make)


def make(max_epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(max_epochs=max_epochs)


def test_lightnings_own_precision_has_a_policy(run):
    config = {key: value for key, value in CONFIG["trainer"].items() if key != "plugins"} | {"precision": "bf16-mixed"}
    Path("stock.yaml").write_text(yaml.safe_dump(CONFIG | {"trainer": config}))
    run("export", "--config=stock.yaml", "--format=weights", "--output=half.pt")
    assert {each.dtype for each in torch.load("half.pt", weights_only=True).values()} == {torch.bfloat16}


# Modules of pytorch_lightning


class OtherNet(other.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    forward, training_step, validation_step = Net.forward, Net.training_step, Net.validation_step
    configure_optimizers = Net.configure_optimizers


class OtherData(other.LightningDataModule):
    size = 24
    setup, train_dataloader, val_dataloader = Data.setup, Data.train_dataloader, Data.train_dataloader


def test_modules_of_the_other_package_are_fitted_planned_compared_and_exported(run, capsys):
    given = {"model": OtherNet, "data": OtherData}
    cli = run("fit", "--config=config.yaml", **given)
    assert type(cli.trainer) is other.Trainer and cli.trainer.global_step == 4
    assert isinstance(cli.trainer.precision_plugin, PerLayerPrecision)
    run("plan", "--config=config.yaml", "--batches=1", "--output=plan.json", **given)
    assert PrecisionPlan.from_file("plan.json").rows
    run("compare", "--config=config.yaml", "--batches=3", "--output=told.json", **given)
    assert json.loads(Path("told.json").read_text())["step"] == "validation_step"
    checkpoint = next(version(0).glob("checkpoints/*.ckpt"))
    run("export", "--config=config.yaml", f"--ckpt_path={checkpoint}", "--format=weights", "--output=half.pt", **given)
    weights = torch.load("half.pt", weights_only=True)
    assert torch.equal(weights["net.2.weight"], cli.model.net[2].weight)


def test_a_cli_of_ones_own_says_for_which_package_it_is(run):
    class Own(MixPrecCLI):
        pass

    with pytest.raises(MixPrecError, match=r"derive it from MixPrecCLI.for_package\('pytorch_lightning'\)"):
        run("fit", "--config=config.yaml", model=OtherNet, data=OtherData, cli=Own)

    class OwnOfOther(MixPrecCLI.for_package("pytorch_lightning")):
        def add_arguments_to_parser(self, parser):
            self.was_asked = True

    cli = run("fit", "--config=config.yaml", model=OtherNet, data=OtherData, cli=OwnOfOther)
    assert cli.was_asked and type(cli.trainer) is other.Trainer
    with pytest.raises(MixPrecError, match="what is installed is 'lightning.pytorch' or 'pytorch_lightning'"):
        MixPrecCLI.for_package("lightning")
