"""``plan`` measures, solves and checks: what it says it measured is what a step by hand under torch.autocast does."""

import copy
import json
import math

import pytest
import torch
from compared_models import Classifier, class_batches
from lightnings import pl
from plugin_models import same, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision, PrecisionPlan, PrecisionPolicy, plan
from lightning_mixprec.deploy.plan_check import PlanCheck

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


class Planned(Classifier):
    """A classifier with data of its own, a layer without products, and dropout."""

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(1)
        x, y = torch.randn(32, 16, generator=draw), torch.randint(0, 4, (32,), generator=draw)
        return DataLoader(TensorDataset(x, y), batch_size=8)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Dropout(0.1), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Planned()


@pytest.fixture
def batches(model):
    return list(model.train_dataloader())


def by_hand(model, batches, dtype, seed):
    """Losses and gradients of training steps under autocast, each from the same random numbers."""
    model, losses, gradients = copy.deepcopy(model).train(), [], []
    for x, y in batches:
        torch.manual_seed(seed)
        model.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model.net(x), y)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]).double())
    return losses, gradients


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_what_is_measured_of_a_policy_is_what_steps_under_autocast_do(model, batches, format):
    from lightning_mixprec.policy.policy import as_policy

    measured = PlanCheck(model, batches, seed=3).measured(as_policy(format), timed=False)
    exact, expected = by_hand(model, batches, None, 3)
    low, gradients = by_hand(model, batches, DTYPES[format], 3)
    gap = math.sqrt(sum((one - other) ** 2 for one, other in zip(low, exact, strict=True)) / len(batches))
    cosines = [torch.cosine_similarity(one, other, dim=0) for one, other in zip(gradients, expected, strict=True)]
    assert measured.loss_gap == pytest.approx(gap, rel=1e-4)
    assert measured.grad_cosine == pytest.approx(min(cosines).item(), abs=1e-4 if format == "fp16" else 1e-9)
    assert (measured.seconds, measured.reference_seconds) == (None, None)


def test_a_plan_chooses_predicts_measures_and_leaves_no_trace(model, batches):
    before, random = snapshot(model), torch.get_rng_state()
    made = plan(model, batches, device="h100", budget={"low_precision_share": 0.5})
    assert same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert made.predicted.low_precision_share >= 0.5
    assert made.predicted.seconds < made.reference.seconds
    assert made.measured.loss_gap <= 4 * made.predicted.loss_gap
    assert made.measured.grad_cosine > 0.99
    assert made.measured.seconds is None, "an H100 is not here to be timed"
    chosen = {row["layer"]: row["format"] for row in made.rows if row["chosen"]}
    resolved = made.policy.resolve(model)
    assert chosen == {name: resolved[name].compute for name in chosen}
    assert made.solve({"low_precision_share": 1.0}).predicted.low_precision_share == pytest.approx(1.0)


def test_on_the_device_at_hand_a_step_is_timed_beside_fp32(model, batches):
    made = plan(model, batches[:1])
    assert made.costs.device == "cpu"
    assert made.measured.seconds > 0
    assert made.measured.reference_seconds > 0
    assert "measured" in str(made)


def trainer_for(tmp_path, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet, **options)


def test_through_a_trainer_it_takes_the_modules_own_data_and_trains_with_the_plan(model, tmp_path):
    made = plan(model, trainer=trainer_for(tmp_path, max_steps=3), max_batches=2, device="h100")
    assert made.sensitivities.batches == 2
    made.to_file(tmp_path / "plan.json")
    read = PrecisionPlan.from_file(tmp_path / "plan.json")
    assert read == made
    trainer = trainer_for(tmp_path, max_steps=3, plugins=PerLayerPrecision(read.policy))
    trainer.fit(model)
    assert trainer.global_step == 3


def test_a_trainer_may_have_the_plugin_and_its_monitors(model, tmp_path):
    plugin = PerLayerPrecision({"default": "fp16", "net.3": "fp32"})
    trainer = trainer_for(tmp_path, max_steps=2, plugins=plugin, callbacks=[OverflowMonitor()])
    made = plan(model, trainer=trainer, max_batches=1, device="h100")
    assert made.sensitivities.batches == 1 and trainer.precision_plugin is plugin
    trainer.fit(model)
    assert trainer.global_step == 2


def test_through_a_trainer_memory_is_that_with_the_modules_optimizer(model, batches, tmp_path):
    in_run = plan(model, trainer=trainer_for(tmp_path, max_steps=3), max_batches=1, device="h100")
    alone = plan(Planned(), batches[:1], device="h100")
    weights = 16 * 32 + 32
    assert in_run.costs.layers["net.0"]["fp32"].weight_bytes == 4 * weights * 2  # SGD: the gradient alone
    assert alone.costs.layers["net.0"]["fp32"].weight_bytes == 4 * weights * 4  # AdamW: and two moments


def test_what_both_16_bits_offer_is_better_than_bf16_at_its_price(model, batches):
    uniform = plan(model, batches, device="h100", budget={"low_precision_share": 1.0}).uniform
    price = {"time": 1.0, "memory": 1.0, "low_precision_share": 1.0}
    made = plan(model, batches, formats=("bf16", "fp16"), device="h100", budget=price)
    bf16 = PlanCheck(model, batches, seed=0).measured(PrecisionPolicy("bf16"), timed=False)
    assert made.predicted.seconds <= made.reference.seconds
    assert made.predicted.low_precision_share == uniform.low_precision_share == 1.0
    assert made.measured.loss_gap < bf16.loss_gap / 2
    assert made.measured.loss_gap < 3 * made.predicted.loss_gap


def test_pinned_layers_stay_and_what_a_format_cannot_hold_is_not_offered(model, batches):
    with torch.no_grad():
        model.net[0].weight *= 1e6
    made = plan(model, batches, formats=("fp16", "bf16"), pin="net.3", device="h100")
    formats = {(row["layer"], row["format"]) for row in made.rows}
    assert ("net.3", "bf16") not in formats
    assert ("net.0", "fp16") not in formats
    assert ("net.0", "bf16") in formats
    assert "overflow fp16" in made.problems["net.0", "fp16"]
    assert made.policy.resolve(model)["net.3"].compute == "fp32"


def test_the_same_seed_gives_the_same_plan(model, batches):
    budget = {"low_precision_share": 0.5}
    one, other = (plan(model, batches[:2], device="h100", budget=budget, seed=5) for _ in range(2))
    assert json.dumps(one.sensitivities.to_dict()) == json.dumps(other.sensitivities.to_dict())
    assert (one.chosen, one.measured) == (other.chosen, other.measured)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batches": [torch.ones(2, 5)]}, r"^batch 0 cannot be run through Planned.training_step: .*give batches as"),
        ({"batches": [(torch.full((2, 16), math.nan), torch.zeros(2).long())]}, "not finite in fp32 on batch 0"),
        ({"batches": []}, "batches has no batch; give one at least"),
        ({"batches": torch.ones(3)}, r"batches is a Tensor; .*\[batch\]"),
        ({"batches": None}, "batches is a NoneType; give a list of what training_step takes, or trainer="),
        ({"device": "h1000"}, "'h1000' is not in the table of devices, did you mean 'h100'?"),
        ({"budget": {"tme": 1}}, "did you mean time?"),
        ({"budget": {"time": 0.001}, "device": "h100"}, "a time of 0.001 .* the least reachable is"),
        ({"formats": ("bf17",)}, "formats has 'bf17', did you mean bf16?"),
        ({"formats": ("fp32",)}, "offers nothing but fp32"),
        ({"pin": "hed"}, r"plan\(pin=...\): \(hed\) matches no layer"),
        ({"max_batches": 0}, "max_batches is 0; it has to be a positive integer"),
        ({"module": nn.Linear(1, 1)}, "got a Linear; it takes a LightningModule"),
        ({"seed": "one"}, "seed is 'one'; it has to be a whole number"),
        ({"seed": 2**70}, r"seed is \d+; it has to be a whole number, as torch.manual_seed takes it"),
        ({"formats": None}, "formats is None; give a string or a list of strings"),
        ({"pin": 3}, "pin is 3; give a string or a list of strings"),
        ({"batches": None, "trainer": "cpu"}, "trainer is a str; give the Trainer"),
    ],
)
def test_bad_input_is_one_line(model, batches, arguments, said):
    with pytest.raises(MixPrecError, match=said) as raised:
        plan(**{"module": model, "batches": batches, **arguments})
    assert "\n" not in str(raised.value)


def test_a_step_that_asks_for_its_trainer_is_told_the_way_out(batches):
    class Asking(Planned):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.trainer.world_size

    with pytest.raises(
        MixPrecError, match=r"training_step asks for its Trainer .* plan\(\) has none; give it trainer="
    ):
        plan(Asking(), batches)


def test_batches_of_a_class_with_integers_work(model):
    made = plan(Classifier(), class_batches()[:1], device="h100")
    assert made.policy is not None


@pytest.mark.gpu
def test_on_a_gpu_a_plan_for_it_is_timed_and_kept(model, batches):
    model.cuda()
    on_gpu = [(x.cuda(), y.cuda()) for x, y in batches]
    made = plan(model, on_gpu, budget={"low_precision_share": 0.5})
    assert made.measured.seconds > 0
    assert made.measured.loss_gap <= 4 * made.predicted.loss_gap


class FailsInBf16(pl.LightningModule):
    """What its step adds up has to be fp32."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(2))

    def training_step(self, batch, batch_idx):
        output = self.two(self.one(batch))
        self.mean.lerp_(output.detach().mean(0), 0.1)
        return output.square().mean()


def test_a_format_in_which_the_whole_step_fails_is_offered_to_layers_where_it_does_not():
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    made = plan(FailsInBf16(), batches, formats=("bf16",), budget={"low_precision_share": 0.5})
    assert made.layer_formats["one"] == "bf16" and made.predicted.low_precision_share >= 0.5


class PartlyWide(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.one, self.exact = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2).double()

    def training_step(self, batch, batch_idx):
        return self.exact(self.one(batch).double()).square().mean()


@pytest.mark.parametrize("share", [0.3, 0.0])
def test_what_the_model_has_in_fp64_stays_there(tmp_path, share):
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    made = plan(PartlyWide(), batches, formats=("bf16",), budget={"low_precision_share": share})
    assert made.policy.resolve(PartlyWide())["exact"].compute == "fp64"
    assert [row["format"] for row in made.rows if row["layer"] == "exact"] == ["fp64"]
    made.to_file(tmp_path / "plan.json")
    assert PrecisionPlan.from_file(tmp_path / "plan.json").policy.to_dict() == made.policy.to_dict()
