"""The examples run as their first lines say, in every form of the command line, and say clearly what is missing."""

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy, PrecisionScheduler

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "image_classification.py"
CONFIGS = ROOT / "examples" / "configs"
SCHEDULES = (ROOT / "examples" / "guides" / "schedules.md").read_text()
EXAMPLES_README = (ROOT / "examples" / "README.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's of jsonargparse
MAIN_CONFIG = f"--config={CONFIGS / 'image_classification.yaml'}"
TINY_RUN = ["--trainer.fast_dev_run=1", "--data.batch_size=4"]
POLICY = {"default": "bf16", "model.fc": "fp32"}


def run(script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    """Put the examples on the path, where a script has its own folder."""
    added = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmarks")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


@pytest.fixture
def classification(examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["image_classification.py"])  # LightningCLI warns if pytest's arguments are there
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets it for good
    return importlib.import_module("image_classification")


@pytest.fixture
def measuring(examples: None) -> ModuleType:
    return importlib.import_module("measuring")


@pytest.fixture
def monitors(examples: None) -> ModuleType:
    return importlib.import_module("monitors")


# The first line of the README, from elsewhere and for two steps


@pytest.mark.slow
def test_the_command_runs_from_anywhere_and_says_what_it_wrote(tmp_path: Path) -> None:
    """The seconds of a process that imports Lightning and torchvision, and of two steps of a ResNet-18."""
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    done = run(SCRIPT, "fit", MAIN_CONFIG, *limits, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    assert "Error" not in done.stderr
    assert re.search(r"model\.conv1 .*Conv2d .*fp32", done.stdout), done.stdout
    assert re.search(r"validation accuracy: +\d+\.\d\d% at the end, \d+\.\d\d% at best", done.stdout)
    assert re.search(r"optimizer steps: +2, and 0 skipped", done.stdout)
    log_dir = tmp_path / "lightning_logs" / "version_0"
    assert str(log_dir) in done.stdout
    assert {"metrics.csv", "config.yaml"} <= {path.name for path in log_dir.iterdir()}
    checkpoint = re.search(r"best checkpoint: +(\S+)", done.stdout)
    assert checkpoint is not None
    assert Path(checkpoint[1]).is_file()


@pytest.mark.slow
def test_a_missing_folder_of_data_is_one_line(tmp_path: Path) -> None:
    config = f"--config={CONFIGS / 'cifar10.yaml'}"
    done = run(SCRIPT, "fit", MAIN_CONFIG, config, "--data.path=/nowhere/at all", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("Seed set to")]
    assert line.startswith("error: no CIFAR-10 in '/nowhere/at all'")
    assert "--data.path" in line


# Forms of the command line


def policy_file(folder: Path) -> str:
    path = folder / "policy.yaml"
    path.write_text("default: bf16\nmodel.fc: fp32\n")
    return str(path)


def as_config(folder: Path, plugins: object) -> str:
    path = folder / "plugins.yaml"
    path.write_text(json.dumps({"trainer": {"plugins": plugins}}))  # JSON is YAML
    return f"--config={path}"


def test_class_name_and_policy_file(classification: ModuleType, tmp_path: Path) -> None:
    arguments = ["--trainer.plugins=PerLayerPrecision", f"--trainer.plugins.policy={policy_file(tmp_path)}"]
    plugin = classification.main(["fit", "--data=Digits", *TINY_RUN, *arguments]).trainer.precision_plugin
    assert plugin.policy == PrecisionPolicy.from_dict(POLICY)
    assert plugin.assignment["model.fc"].compute == "fp32"


def test_class_name_over_the_plugin_of_a_config(classification: ModuleType, tmp_path: Path) -> None:
    arguments = ["--trainer.plugins=PerLayerPrecision", f"--trainer.plugins.policy={policy_file(tmp_path)}"]
    plugin = classification.main(["fit", MAIN_CONFIG, *TINY_RUN, *arguments]).trainer.precision_plugin
    assert plugin.policy == PrecisionPolicy.from_dict(POLICY)


def test_class_name_and_format_name(classification: ModuleType) -> None:
    arguments = ["--trainer.plugins=PerLayerPrecision", "--trainer.plugins.policy=fp32"]
    plugin = classification.main(["fit", "--data=Digits", *TINY_RUN, *arguments]).trainer.precision_plugin
    assert plugin.policy == PrecisionPolicy("fp32")


@pytest.mark.parametrize("as_list", [False, True])
def test_mapping_and_list(classification: ModuleType, tmp_path: Path, as_list: bool) -> None:
    scaling = {"init_scale": 1024.0, "growth_interval": 7}
    one = {"class_path": "PerLayerPrecision", "init_args": {"policy": POLICY, "loss_scaling": scaling}}
    config = as_config(tmp_path, [one] if as_list else one)
    plugin = classification.main(["fit", "--data=Digits", *TINY_RUN, config]).trainer.precision_plugin
    assert plugin.policy == PrecisionPolicy.from_dict(POLICY)
    assert plugin.scaler.get_scale() == 1024.0


def test_a_rule_that_fits_nothing_is_one_line(classification: ModuleType, tmp_path: Path) -> None:
    plugins = {"class_path": "PerLayerPrecision", "init_args": {"policy": {"default": "bf16", "model.fcc": "fp32"}}}
    with pytest.raises(MixPrecError, match="model.fc") as raised:
        classification.main(["fit", "--data=Digits", *TINY_RUN, as_config(tmp_path, plugins)])
    assert "\n" not in str(raised.value)


def test_a_malformed_policy_comes_out_of_what_the_cli_wraps_it_in(classification: ModuleType, tmp_path: Path) -> None:
    plugins = {"class_path": "PerLayerPrecision", "init_args": {"policy": "bf61"}}
    with pytest.raises(Exception) as raised:
        classification.main(["fit", "--data=Digits", *TINY_RUN, as_config(tmp_path, plugins)])
    error = importlib.import_module("shared.common").user_error(raised.value)
    assert isinstance(error, MixPrecError)
    assert "\n" not in str(error)
    assert importlib.import_module("shared.common").user_error(KeyError("x")) is None


def test_lightnings_own_precision_for_comparison(classification: ModuleType, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--trainer.precision=bf16-mixed", "--trainer.plugins=null"]
    plugin = classification.main(["fit", MAIN_CONFIG, *TINY_RUN, *arguments]).trainer.precision_plugin
    assert type(plugin).__name__ == "MixedPrecision"
    assert "skipped" not in capsys.readouterr().out


# Configs and data


def test_every_config_of_the_image_classification_is_tried_here() -> None:
    """Those for it have its name, or say after which of its configs they are given."""
    assert {path.stem for path in CONFIGS.iterdir() if SCRIPT.stem in path.stem + path.read_text()} == {
        "image_classification",
        "image_classification_fp16",
        "cifar10",
        "imagenet",
        "resnet50_imagenet",
        "inception_v3_imagenet",
        "schedule_fp32_warmup",
        "schedule_bf16_tail",
        "schedule_fp32_end",
        "adaptive",
    }


def test_the_main_config_mixes_formats(classification: ModuleType) -> None:
    assignment = classification.main(["fit", MAIN_CONFIG, *TINY_RUN]).trainer.precision_plugin.assignment
    assert (assignment["model.conv1"].compute, assignment["model.fc"].compute) == ("fp32", "fp32")
    assert assignment["model.layer3.0.conv1"].compute == "bf16"
    norm = assignment["model.layer3.0.bn1"]
    assert (norm.compute, norm.output) == ("fp32", "input")


@pytest.mark.filterwarnings("ignore:.*fp16")
def test_the_fp16_config_scales_the_loss(classification: ModuleType, capsys: pytest.CaptureFixture) -> None:
    config = f"--config={CONFIGS / 'image_classification_fp16.yaml'}"
    cli = classification.main(["fit", config, *TINY_RUN])
    plugin = cli.trainer.precision_plugin
    scale = 65536 * 0.5**plugin.skipped_steps
    assert plugin.scaler.get_scale() == scale
    assert cli.trainer.global_step + plugin.skipped_steps == 1
    assert f"loss scale:           {scale:g}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_cifar10_trains(classification: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    arguments = [f"--config={CONFIGS / 'cifar10.yaml'}", f"--data.path={tmp_path}", "--data.num_workers=0"]
    with pytest.raises(importlib.import_module("shared.data").DataError, match="incomplete or damaged"):
        classification.main(["fit", MAIN_CONFIG, *arguments, *TINY_RUN])
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    cli = classification.main(["fit", MAIN_CONFIG, *arguments, *TINY_RUN])
    assert cli.model.model.conv1.stride == (1, 1)
    assert cli.trainer.global_step == 1


def image_folders(root: Path) -> None:
    """Write two images of each of three classes, to train and to validate."""
    for part, name in [(p, n) for p in ("train", "val") for n in ("cat", "dog", "eel")]:
        (root / part / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 48), (i * 90, 10, 200)).save(root / part / name / f"{i}.png")


def test_imagenet_folders_train(classification: ModuleType, tmp_path: Path) -> None:
    image_folders(tmp_path)
    arguments = [f"--config={CONFIGS / 'imagenet.yaml'}", f"--data.path={tmp_path}", "--data.num_workers=0"]
    cli = classification.main(["fit", MAIN_CONFIG, *arguments, *TINY_RUN, "--data.size=32"])
    assert cli.model.model.fc.out_features == 3
    assert cli.model.model.conv1.stride == (2, 2)
    data = importlib.import_module("shared.data")
    (tmp_path / "val" / "fox").mkdir()
    with pytest.raises(data.DataError, match="differ between train and val: fox"):
        data.ImageFolder(str(tmp_path))
    with pytest.raises(data.DataError, match="no class folders in '/nowhere/train'.*--data.path"):
        data.ImageFolder("/nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "in_fp32"),
    [
        ("resnet50", ["--data.size=32"], {"model.conv1", "model.fc"}),
        ("inception_v3", [], {"model.Conv2d_1a_3x3.conv", "model.fc", "model.AuxLogits.fc"}),
        (
            "inception_v3",
            ["--data.size=75", "--model.auxiliary_head=false"],
            {"model.Conv2d_1a_3x3.conv", "model.fc"},
        ),
    ],
)
def test_other_architectures_train_on_folders(
    classification: ModuleType, tmp_path: Path, name: str, options: list[str], in_fp32: set[str]
) -> None:
    image_folders(tmp_path)
    config = f"--config={CONFIGS / f'{name}_imagenet.yaml'}"
    data = [f"--data.path={tmp_path}", "--data.num_workers=0", "--data.batch_size=2", *options]
    quick = ["--trainer.fast_dev_run=1", "--trainer.callbacks=null"]
    cli = classification.main(["fit", MAIN_CONFIG, config, *data, *quick])
    assert cli.trainer.global_step == 1
    layers = {n for n, layer in cli.model.named_modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))}
    assert in_fp32 == {n for n in layers if cli.trainer.precision_plugin.assignment[n].compute == "fp32"}


def test_a_resnet50_keeps_the_size_of_small_images(classification: ModuleType) -> None:
    model = classification.build("resnet50", num_classes=10, small_images=True)
    assert (model.conv1.stride, model.fc.in_features) == ((1, 1), 2048)
    assert isinstance(model.maxpool, torch.nn.Identity)


def test_inception_refuses_small_images_in_one_line(classification: ModuleType) -> None:
    with pytest.raises(Exception) as raised:
        classification.main(["fit", MAIN_CONFIG, *TINY_RUN, "--model.architecture=inception_v3"])
    error = importlib.import_module("shared.common").user_error(raised.value)
    assert str(error).startswith("inception_v3 takes images of 299 pixels a side or more, and these are 8x8 or 32x32;")
    assert "\n" not in str(error)


def test_inception_says_which_size_of_folders_it_takes(classification: ModuleType, tmp_path: Path) -> None:
    image_folders(tmp_path)
    config = f"--config={CONFIGS / 'inception_v3_imagenet.yaml'}"
    data = [f"--data.path={tmp_path}", "--data.num_workers=0", "--data.size=224"]
    error = importlib.import_module("shared.data").DataError
    with pytest.raises(error, match=r"299 pixels.*these have 224; give --data.size=299, or --model.auxiliary_head"):
        classification.main(["fit", MAIN_CONFIG, config, *data, *TINY_RUN])


def test_the_auxiliary_head_of_inception_has_its_share_of_the_loss(classification: ModuleType) -> None:
    model = classification.ImageClassifier(num_classes=3, small_images=True, label_smoothing=0.1)
    logits, auxiliary = torch.randn(2, 5, 3)
    labels = torch.tensor([0, 1, 2, 0, 1])
    target = torch.eye(3)[labels] * 0.9 + 0.1 / 3
    main, second = (-(target * each.log_softmax(1)).sum(1).mean() for each in (logits, auxiliary))
    assert torch.isclose(model.criterion(logits, labels), main)
    assert torch.isclose(model.criterion((logits, auxiliary), labels), main + 0.4 * second)


def test_the_digits_are_split_evenly_and_always_alike(examples: None) -> None:
    data = importlib.import_module("shared.data")
    (train, val), (again, _) = data.Digits().datasets(), data.Digits().datasets()
    assert (len(train), len(val)) == (1437, 360)
    assert torch.equal(train.tensors[0], again.tensors[0])
    share = torch.bincount(val.tensors[1]) / (torch.bincount(train.tensors[1]) + torch.bincount(val.tensors[1]))
    assert share.sub(0.2).abs().max() < 0.01
    assert train.tensors[0].shape[1:] == (3, 8, 8)
    assert abs(train.tensors[0].mean()) < 1e-5
    assert abs(train.tensors[0].std() - 1) < 1e-5


# Formats that change while it trains

CHANGING = {
    "schedule_fp32_warmup": ("fp32", "bf16", "epoch 1"),
    "schedule_bf16_tail": ("fp32", "bf16", "learning rate below 0.95 of its peak"),
    "schedule_fp32_end": ("bf16", "fp32", "epoch 10"),
}
EPOCHS_OF_ONE_STEP = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--data.batch_size=4"]


def trained(classification: ModuleType, config: str, *arguments: str) -> object:
    """Run it under the main config and another one after it, quickly."""
    changes = f"--config={CONFIGS / config}.yaml"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    return classification.main(["fit", MAIN_CONFIG, changes, *EPOCHS_OF_ONE_STEP, *quiet, *arguments]).trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGING)
def test_a_scheduled_phase_comes_when_the_readme_says(
    classification: ModuleType, capsys: pytest.CaptureFixture, name: str
) -> None:
    old, new, moment = CHANGING[name]
    trainer = trained(classification, name)
    entries = [entry for entry in trainer.precision_plugin.history if entry["layer"] == ""]
    assert (entries[-1]["from"], entries[-1]["to"]) == (old, new)
    assert entries[-1]["reason"] == f"schedule: {moment}"
    line = rf"PrecisionScheduler: step {entries[-1]['step']}, epoch \d+: default {old} -> {new}; .* \({moment}\)\n"
    said = re.search(line, capsys.readouterr().out)
    assert said is not None
    if name == "schedule_fp32_warmup":  # an epoch has 22 steps there, and one here
        assert said[0].replace("step 1,", "step 22,") in SCHEDULES
    example = re.search(rf"{name}\.yaml.*PrecisionScheduler: step (\d+), epoch (\d+).*\({moment}\)", EXAMPLES_README)
    assert example is not None
    if moment.startswith("epoch"):  # the other moment depends on how many steps there are
        epoch = entries[-1]["step"]
        assert [int(number) for number in example.groups()] == [22 * epoch, epoch]


@pytest.mark.slow
def test_a_healthy_run_moves_nothing_and_learns_the_policy_it_began_with(
    classification: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    trainer = trained(classification, "adaptive", "--trainer.max_epochs=2", "--data.batch_size=16")
    assert trainer.precision_plugin.history == []
    printed = capsys.readouterr().out
    assert "AdaptivePrecision: 0 moves, 99.7% of the matrix products' flops in at most 16 bits\n" in printed
    assert "AdaptivePrecision: 0 moves, 99.7% of the matrix products' flops in at most 16 bits" in EXAMPLES_README
    assert {"OverflowMonitor", "AdaptivePrecision"} <= {type(each).__name__ for each in trainer.callbacks}
    learned = (Path(trainer.log_dir) / "learned_policy.yaml").read_text()
    assert f"```yaml\n{learned}```" in EXAMPLES_README
    assert PrecisionPolicy.from_dict(yaml.safe_load(learned)) == trainer.precision_plugin.policy


def recipes() -> list[str]:
    """Return the phases in the guide's table of recipes."""
    (table,) = re.findall(r"\| recipe \| `phases` \|\n\|---\|---\|\n((?:\|.*\n)+)", SCHEDULES)
    return re.findall(r"\| `(\[.*\])` \|\n", table)


@pytest.mark.parametrize("phases", recipes())
def test_every_phase_of_the_guide_s_recipes_comes(phases: str, tmp_path: Path) -> None:
    scheduler = PrecisionScheduler(yaml.safe_load(phases))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=20,
        limit_train_batches=2,
        log_every_n_steps=1,
        callbacks=scheduler,
        plugins=PerLayerPrecision("bf16"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Stalling())
    assert len(scheduler.came) == len(scheduler.phases)
    assert trainer.precision_plugin.history


class Stalling(pl.LightningModule):
    """A model with a head whose learning rate decays and whose validation loss stays where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 1)})

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model["head"](self.model["body"](batch[0])).square().mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", 1.0, batch_size=1)

    def train_dataloader(self) -> object:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 4)), batch_size=2)

    def val_dataloader(self) -> object:
        return self.train_dataloader()

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


# The benchmarks


def benchmark(script: str, folder: Path, *options: str, model: str = "tiny") -> tuple[dict, str]:
    """Run it on a model, quickly; return what it wrote and what it printed."""
    output = folder / "new" / "report.json"
    arguments = ["--device", "cpu", "--quick", "--models", model, *options, "--output", str(output)]
    done = run(ROOT / "examples" / "benchmarks" / script, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert report["settings"]["rounds"] == 2
    return report, done.stdout


@pytest.mark.slow
def test_the_overhead_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    report, printed = benchmark("overhead.py", tmp_path, "--formats", "bf16")
    rows = {row["kind"]: row for row in report["results"]}
    assert list(rows) == ["stock", "again", "uniform", "unguarded", "mixed"]
    assert rows["stock"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert [rows[kind]["target"] for kind in ("again", "uniform", "mixed")] == [None, 1.02, 1.10]
    assert rows["uniform"]["memory_bytes"] == rows["stock"]["memory_bytes"]
    assert rows["uniform"]["loss_equals_stock"]
    assert rows["stock"]["host_reads_per_step"] == 0
    assert all(f"tiny bf16 {kind} " in printed for kind in rows)


@pytest.mark.slow
def test_the_monitors_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    report, printed = benchmark("monitors.py", tmp_path, "--modes", "eager", "--formats", "bf16")
    rows = {row["kind"]: row for row in report["results"]}
    plain = ["none", "again", "empty", "report", "idle", "defaults", "statistics"]
    events = ["sampled", "underflow", "fidelity", "diagnosis"]
    assert list(rows) == plain + events
    assert rows["none"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert [rows[kind]["target"] for kind in ("none", "idle", "defaults")] == [None, None, 1.02]
    assert rows["idle"]["added_host_reads"] == rows["idle"]["host_reads_per_step"] - rows["none"]["host_reads_per_step"]
    assert all(rows[kind]["ratio"]["median"] > 2 for kind in events)
    assert all(f"tiny bf16 {kind} " in printed for kind in rows)


@pytest.mark.slow
def test_the_emulation_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    report, printed = benchmark("emulation.py", tmp_path, "--compilers", "eager", "--rounds", "2", model="gpt")
    rows = {row["case"]: row for row in report["results"]}
    assert list(rows) == ["fp32", "bf16 emulated", "fp16 emulated"]
    for kind in ("ratio", "cpu_time_ratio"):
        assert rows["fp32"][kind] == {"median": 1, "least": 1, "largest": 1}
        assert all(row[kind]["least"] <= row[kind]["median"] <= row[kind]["largest"] for row in rows.values())
    assert all(f"gpt       eager      {case} " in printed for case in rows)


def quick_bench(monitors: ModuleType, name: str, compiled: bool = False) -> object:
    options = {"device": "cpu", "quick": True, "warmup": 2, "steps": 6, "backend": "eager"}
    return monitors.Bench(monitors.Setting("tiny", name, compiled), type("Options", (), options))


def test_what_the_monitors_benchmark_trains(monitors: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["monitors.py", "--device", "cpu", "--models", "resnet18"])
    names = [(setting.format, setting.compiled) for setting in monitors.settings(monitors.parse())]
    assert names == [("fp32", False), ("bf16", False), ("bf16-mixed", False), ("fp32", True), ("bf16", True)]
    setting = monitors.Setting("resnet18", "bf16-mixed", False)
    assert type(setting.case.plugin("cpu")).__name__ == "MixedPrecision"
    assert "diagnosis" not in setting.blocks()
    assert setting.targets() == {"defaults": 1.02, "report": 1.02, "statistics": 1.15}


@pytest.mark.slow
def test_a_compiled_model_is_measured_beside_its_own_plain_steps(monitors: ModuleType) -> None:
    bench = quick_bench(monitors, "bf16", compiled=True)
    bench.inspect()
    for kind in bench.setting.blocks():
        bench.time(kind)
        bench.time(kind)
    kinds = ["none", "again", "report", "idle", "defaults", "statistics", "sampled"]
    assert [row["kind"] for row in bench.rows()] == kinds
    assert [row["host_reads_per_step"] for row in bench.rows()] == [None] * 7  # the counter cannot see into it


def test_an_event_costs_what_its_two_steps_take_beyond_an_idle_one(monitors: ModuleType) -> None:
    seconds = [103.0, 5.0] + [1.0] * 998  # a sampled step, what it leaves to the next, and idle ones
    spans = [sum(seconds[:2]) / 2, sum(seconds[2:]) / 998]
    assert monitors.derived("sampled", spans) == {"sampled": 107.0, "idle": 1.0, "defaults": sum(seconds) / 1000}
    assert monitors.derived("diagnosis", spans) == {"diagnosis": 107.0}
    assert monitors.derived("empty", [1.5]) == {"empty": 1.5}


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_overflowing_batch_is_diagnosed(monitors: ModuleType, measuring: ModuleType, name: str) -> None:
    bench = quick_bench(monitors, name)
    monitor = monitors.OverflowMonitor()
    batches = measuring.Repeated(bench.task.batch, 2, {1: monitors.overflowing(bench.task.batch, name)})
    with pytest.warns(UserWarning, match="batch 1"):
        measuring.train(bench.task, bench.setting.case.plugin("cpu"), batches, [monitor], "cpu")
    assert [event["verdict"] for event in monitor.events] == ["precision" if name == "fp16" else "data"]


def test_an_event_that_did_not_happen_is_an_error(monitors: ModuleType) -> None:
    with pytest.raises(AssertionError, match="UnderflowMonitor sampled nothing"):
        monitors.check("underflow", monitors.callbacks("underflow", 2), 2)
    with pytest.raises(AssertionError, match="diagnosed batches"):
        monitors.check("diagnosis", monitors.callbacks("diagnosis", 2), 2)


@pytest.mark.parametrize(("name", "reads"), [("fp32", 0), ("fp16", 1)])
def test_the_inspector_counts_saved_bytes_and_host_reads(measuring: ModuleType, name: str, reads: int) -> None:
    workloads = importlib.import_module("workloads")
    case = workloads.Case("tiny", False, name, "stock")
    task = workloads.Task(case, quick=True, device="cpu")
    inspector = measuring.Inspector(step=1, device="cpu")
    measuring.train(task, case.plugin("cpu"), workloads.Repeated(task.batch, 3), [inspector], "cpu")
    assert inspector.host_reads == reads  # torch's GradScaler reads found_inf once for each optimizer step
    if name == "fp32":
        activations = 32 * 32 * 4  # batch x width x bytes: each layer's input, the last output, the log-softmax
        assert inspector.memory_bytes == 34 * activations + 32 * 8 + 4  # and the labels and the sum of their weights


def test_the_spread_is_that_of_the_ratios(measuring: ModuleType) -> None:
    assert measuring.spread([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
