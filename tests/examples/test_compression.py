"""What is particular to the examples on GANs, physics-informed networks, distillation, pruning and quantization."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUICK = [
    "--trainer.fast_dev_run=1",
    "--trainer.callbacks=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    """Put the examples on the path, where a script has its own folder."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a function that runs an example with its own config for one step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def run(name: str, *arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        config = f"--config={ROOT / 'examples' / 'configs' / f'{name}.yaml'}"
        return importlib.import_module(name).main(["fit", config, *QUICK, *arguments])

    return run


def formats(cli: object, *layers: str) -> list[str]:
    assignment = cli.trainer.precision_plugin.assignment
    return [assignment[layer].compute for layer in layers]


# Physics-informed network


def test_the_residual_of_the_exact_solution_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    pinn = importlib.import_module("pinn")
    model = pinn.HeatConduction().double()
    local = torch.rand(64, 2, dtype=torch.float64)
    assert model.residual(local).abs().max() > 1
    monkeypatch.setattr(model, "solution", pinn.temperature)
    assert model.residual(local).abs().max() < 1e-10


def test_the_network_is_zero_on_the_border() -> None:
    model = importlib.import_module("pinn").HeatConduction()
    border = torch.tensor([[0.0, 0.3], [1.0, 0.7], [0.2, 0.0], [0.9, 1.0]])
    assert torch.equal(model.solution(border), torch.zeros(4))


def test_fp32_rounds_map_coordinates_and_fp64_does_not() -> None:
    pinn = importlib.import_module("pinn")
    wide, rounded = pinn.Points(), pinn.Points(storage="fp32")
    for data in (wide, rounded):
        data.setup("fit")
    local, coarse = (pinn.Frame()(data.train_set.tensors[0].double()) for data in (wide, rounded))
    assert ((local >= 0) & (local <= 1)).all()
    assert (coarse - local)[:, 1].abs().max() * pinn.SIDE > 0.2  # metres
    again = pinn.Points()
    again.setup("fit")
    assert torch.equal(again.train_set.tensors[0], wide.train_set.tensors[0])
    points, truth = wide.val_set.tensors
    assert torch.allclose(pinn.temperature(pinn.Frame()(points)), truth, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_coordinates_and_residual_are_fp64_and_the_network_is_fp32(fitted: Callable, optimizer: str) -> None:
    cli = fitted("pinn", f"--model.optimizer={optimizer}")
    assert formats(cli, "", "frame", "network.0", "network.6") == ["fp64", "fp64", "fp32", "fp32"]
    assert cli.trainer.global_step == 1
    assert cli.trainer.callback_metrics["val_error"].isfinite()


def test_own_points_are_read_and_wrong_ones_are_one_line(tmp_path: Path) -> None:
    pinn, error = importlib.import_module("pinn"), importlib.import_module("shared.data").DataError
    path = tmp_path / "points.csv"
    path.write_text("691610.25,5334761.5\n")
    assert torch.equal(pinn.read_points(path), torch.tensor([[691610.25, 5334761.5]], dtype=torch.float64))
    with pytest.raises(error, match="^no table of points in '/nowhere.csv'; give lines of easting,northing"):
        pinn.read_points(Path("/nowhere.csv"))
    for text in ("1,2\n", "691610,5334761,3\n"):
        path.write_text(text)
        with pytest.raises(error, match="^not all 1 lines of .* are points of the square; give"):
            pinn.read_points(path)


# GAN


def test_the_frechet_distance_of_normal_samples() -> None:
    metric = importlib.import_module("gan").FrechetDistance(2)
    real = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])  # variances 1/2 and 2
    metric.update(real[:1], real[:3])
    metric.update(real[1:], real[3:])
    assert abs(metric.compute()) < 1e-6
    metric.reset()
    metric.update(real, 3 * real + torch.tensor([1.0, 2.0]))
    expected = 1 + 4 + (3 - 1) ** 2 * (0.5 + 2)  # |m - n|^2 + sum of (s - t)^2
    assert torch.isclose(metric.compute(), torch.tensor(expected, dtype=torch.float64))


def test_both_networks_step_and_the_logits_are_fp32(fitted: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    gan = importlib.import_module("gan")
    monkeypatch.setattr(gan, "JUDGE_EPOCHS", 0)
    cli = fitted("gan", "--data.batch_size=8")
    assert formats(cli, "", "discriminator.logit.real", "judge.head") == ["fp32"] * 3
    assert formats(cli, "discriminator.features.0", "generator.pixels") == ["bf16"] * 2
    assert cli.trainer.global_step == 2  # one of each optimizer
    torch.manual_seed(0)
    for optimizer, network in zip(cli.trainer.optimizers, (cli.model.generator, cli.model.discriminator), strict=True):
        assert {id(weight) for weight in optimizer.state} == {id(weight) for weight in network.parameters()}
    error = importlib.import_module("shared.data").DataError
    with pytest.raises(error, match=r"shape \(3, 8, 8\) and samples \(3, 16, 16\).*--model.size"):
        fitted("gan", "--model.size=16")


# Compression


def test_the_loss_of_soft_targets_is_the_divergence() -> None:
    distillation = importlib.import_module("distillation")
    logits, taught = torch.randn(2, 5, 3)
    p, q = (taught / 4).softmax(1), (logits / 4).softmax(1)
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    assert torch.isclose(distillation.soft_target_loss(logits, taught, 4.0), expected, rtol=1e-4)


def test_the_teacher_stays_and_computes_in_bf16(fitted: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("distillation"), "TEACHER_EPOCHS", 0)
    cli = fitted("distillation")
    assert formats(cli, "", "model.head", "teacher.head", "teacher.features.0") == ["fp32", "fp32", "bf16", "bf16"]
    assert not any(weight.requires_grad for weight in cli.model.teacher.parameters())
    assert torch.equal(cli.model.teacher.features[1].running_mean, torch.zeros(32))  # in evaluation mode


def test_a_teacher_that_is_none_is_one_line(tmp_path: Path) -> None:
    read = importlib.import_module("distillation").resnet18_from
    error = importlib.import_module("shared.data").DataError
    with pytest.raises(error, match="^no file '/nowhere.ckpt'; give a checkpoint"):
        read("/nowhere.ckpt", 10, True)
    torch.save({"state_dict": {"model.fc.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.raises(error, match=r"^'.*a.ckpt' holds no ResNet-18 for 10 classes; give a checkpoint"):
        read(str(tmp_path / "a.ckpt"), 10, True)


def test_a_checkpoint_of_a_resnet18_teaches(tmp_path: Path) -> None:
    build = importlib.import_module("image_classification").build
    network = build("resnet18", 10, True)
    torch.save({"state_dict": {f"model.{n}": w for n, w in network.state_dict().items()}}, tmp_path / "a.ckpt")
    teacher = importlib.import_module("distillation").resnet18_from(str(tmp_path / "a.ckpt"), 10, True)
    assert torch.equal(teacher.fc.weight, network.fc.weight)


def test_pruning_takes_the_smallest_weights_of_the_first_epochs_only() -> None:
    small_models, pruning = importlib.import_module("shared.small_models"), importlib.import_module("pruning")
    pruner = small_models.GradualPruning(amount=0.5, epochs=2)
    model = small_models.SmallNet(10, 4)
    pruner.setup(None, model, "fit")
    assert [pruner.due(epoch) for epoch in (0, 1, 2)] == [0.5, 0.5, 0.0]
    largest = model.head.weight.abs().max().item()
    pruner.apply_pruning(0.5)
    assert abs(pruning.sparsity(model) - 0.5) < 0.01
    pruner.apply_pruning(0.5)
    assert abs(pruning.sparsity(model) - 0.75) < 0.01
    assert model.head.weight.abs().max().item() == largest
    assert (model.features[1].weight == 1).all()  # the norm's


def test_fake_quantization_computes_in_fp32_and_int8_follows(fitted: Callable) -> None:
    cli = fitted("quantization", "--model.learn_from=0")
    inside = "model.1.features.0"
    assert formats(cli, inside, f"{inside}.weight_fake_quant", f"{inside}.activation_post_process") == [
        "bf16",
        "fp32",
        "fp32",
    ]
    (int8,) = cli.model.int8
    assert type(int8[1].head).__module__.startswith("torch.ao.nn.quantized")
    assert int8[1].head.weight().dtype is torch.qint8
    assert isinstance(cli.model.model[1].head, nn.Linear)
    assert cli.trainer.callback_metrics["agreement"].isfinite()
