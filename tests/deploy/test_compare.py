"""``compare`` says what loops by hand under torch.autocast say, and nothing of the module changes."""

import copy
import math

import pytest
import torch
import torchmetrics
from compared_models import Classifier, class_batches
from lightnings import CSVLogger, pl
from plugin_models import one_line, same, snapshot
from torch import nn
from torch.utils.data import DataLoader

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy, compare, plan
from lightning_mixprec.numerics.similarity import sqnr_db

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def by_hand(model, batches, dtype, head_in_fp32=False):
    """Losses and outputs of an eval loop without gradients under autocast."""
    model, losses, outputs = copy.deepcopy(model).eval(), [], []
    for x, y in batches:
        with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model.net(x)
            losses.append(float(nn.functional.cross_entropy(logits, y)))
            outputs.append(logits.float())
    return losses, outputs


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier()


@pytest.mark.parametrize("format", DTYPES)
def test_a_uniform_policy_is_a_loop_under_autocast_bit_for_bit(model, format):
    batches = class_batches()
    (row,) = compare(model, {"it": format}, batches, repeats=1, emulate=False).rows
    exact, outputs = by_hand(model, batches, None)
    low, low_outputs = by_hand(model, batches, DTYPES[format])
    gaps = [one - other for one, other in zip(low, exact, strict=True)]
    assert row["loss"] == math.fsum(low) / len(low)
    assert row["loss_gap"] == pytest.approx(math.fsum(gaps) / len(gaps), rel=1e-12, abs=1e-15)
    assert row["loss_gap_low"] <= row["loss_gap"] <= row["loss_gap_high"]
    expected = sqnr_db(torch.cat(outputs), torch.cat(low_outputs)).item()
    assert row["output_sqnr_db"] == pytest.approx(expected, rel=1e-9)
    equal = torch.cat(outputs).argmax(1) == torch.cat(low_outputs).argmax(1)
    assert row["equal_decisions"] == equal.double().mean().item()


def test_a_mixed_policy_is_a_loop_with_a_layer_outside_autocast(model):
    batches = class_batches()
    (row,) = compare(model, {"it": {"default": "bf16", "net.4": "fp32"}}, batches, repeats=1, emulate=False).rows
    losses, eval_model = [], copy.deepcopy(model).eval()
    for x, y in batches:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = eval_model.net[:4](x)
            with torch.autocast("cpu", enabled=False):
                logits = eval_model.net[4](hidden.float())
            losses.append(float(nn.functional.cross_entropy(logits, y)))
    assert row["loss"] == math.fsum(losses) / len(losses)


def test_the_keys_of_a_row_are_the_contract(model):
    comparison = compare(model, {"a": "bf16", "b": "fp32"}, class_batches(2), repeats=1)
    keys = "policy loss loss_gap loss_gap_low loss_gap_high output_sqnr_db equal_decisions time_ratio memory_ratio"
    assert [row["policy"] for row in comparison.rows] == ["a", "b"]
    assert all(set(keys.split()) <= set(row) for row in comparison.rows)
    assert comparison.rows[1]["output_sqnr_db"] == math.inf
    assert comparison.rows[1]["memory_ratio"] == 1.0 and comparison.reference["time_ratio"] == 1.0


class Drawing(Classifier):
    """Random numbers in every step, and as many as the weights' format says, so that policies draw differently."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.randn(x.shape)
        if torch.is_autocast_enabled("cpu"):
            torch.randn(7)
        return nn.functional.cross_entropy(self(x + noise), y)


def test_each_batch_begins_with_the_same_random_numbers_under_every_policy():
    torch.manual_seed(0)
    model, batches = Drawing(), class_batches()
    state = torch.get_rng_state()
    comparison = compare(model, {"bf16": "bf16", "again": "fp32"}, batches, repeats=1, emulate=False)
    assert torch.equal(torch.get_rng_state(), state)
    noisy = [(x + torch.randn(x.shape), y) for x, y in batches]
    assert comparison.reference["loss"] == math.fsum(by_hand(model, noisy, None)[0]) / len(batches)
    low = by_hand(model, noisy, torch.bfloat16)[0]
    assert comparison.rows[0]["loss"] == math.fsum(low) / len(low)
    assert comparison.rows[1]["loss_gap"] == 0.0


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_the_module_changes(model, train):
    model.train(train)
    model.net[0].eval()
    model.net[4].requires_grad_(False)
    model.net[0](torch.randn(2, 16)).sum().backward()
    grads = [None if param.grad is None else param.grad.clone() for param in model.parameters()]
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    flags = [(module.training, dict(module._forward_hooks)) for module in model.modules()]
    batches, kept = class_batches(), class_batches()
    policies = {"bf16": "bf16", "stored": {"default": "fp32", "net.4": "p=bf16,c=bf16"}}
    compare(model, policies, batches, repeats=2, metric=lambda output, batch: 0.0)
    assert snapshot(model) == before and same(model.state_dict(), state) and model.seen == []
    assert [(module.training, dict(module._forward_hooks)) for module in model.modules()] == flags
    assert all(same(one, other.grad) for one, other in zip(grads, model.parameters(), strict=True))
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert all(same(one, other) for one, other in zip(batches, kept, strict=True))


def test_outputs_are_those_of_the_last_top_level_child_where_forward_is_not_called():
    class Unforwarded(Classifier):
        def __init__(self):
            super().__init__()
            self.loss = nn.CrossEntropyLoss()  # called last, and hands on no output but a number

        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    torch.manual_seed(0)
    batches = class_batches()
    (row,) = compare(Unforwarded(), {"bf16": "bf16"}, batches, repeats=1, emulate=False).rows
    torch.manual_seed(0)
    model = Classifier()
    (expected,) = compare(model, {"bf16": "bf16"}, batches, repeats=1, emulate=False).rows
    for column in ("loss", "output_sqnr_db", "equal_decisions"):
        assert row[column] == expected[column]


def test_there_are_no_decisions_in_a_regression():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

    (row,) = compare(Regression(), {"bf16": "bf16"}, [x for x, _ in class_batches()], repeats=1).rows
    assert row["output_sqnr_db"] > 20
    assert row["equal_decisions"] is None


METRICS = {
    "torchmetrics": (torchmetrics.classification.MulticlassAccuracy(4, average="micro"), "MulticlassAccuracy"),
    "collection": (
        torchmetrics.MetricCollection({"accuracy": torchmetrics.classification.MulticlassAccuracy(4, average="micro")}),
        "accuracy",
    ),
    "function": (lambda output, batch: (output.argmax(1) == batch[1]).float().mean(), "metric"),
    "mapping": ({"right": lambda output, batch: float((output.argmax(1) == batch[1]).float().mean())}, "right"),
}


@pytest.mark.parametrize(("metric", "column"), METRICS.values(), ids=METRICS)
def test_metrics_are_columns(model, metric, column):
    batches = class_batches()
    comparison = compare(model, {"bf16": "bf16"}, batches, metric=metric, repeats=1, emulate=False)
    for row, dtype in ((comparison.reference, None), (comparison.rows[0], torch.bfloat16)):
        outputs = torch.cat(by_hand(model, batches, dtype)[1])
        right = outputs.argmax(1) == torch.cat([y for _, y in batches])
        assert row[column] == pytest.approx(right.double().mean().item())
    assert column in str(comparison)


# With a Trainer


class Loaded(Classifier):
    """Validates on its own data, with metrics of its own, of which one is computed where the epoch ends."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4, average="micro")
        self.epoch = torchmetrics.MeanMetric()

    def train_dataloader(self):
        return DataLoader(class_batches(2, seed=5), batch_size=None)

    def val_dataloader(self):
        batches = class_batches(5)
        batches[-1] = tuple(each[:8] for each in batches[-1])  # the mean is of examples, not of batches
        return DataLoader(batches, batch_size=None)

    def validation_step(self, batch, number):  # any name will do
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        self.accuracy.update(logits, batch[1])
        self.epoch.update(logits.float().mean())
        self.log("own_accuracy", self.accuracy)
        assert self.trainer is not None

    def on_validation_epoch_end(self):
        self.log("epoch_mean", self.epoch.compute())
        self.epoch.reset()


def quiet_trainer(**arguments):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_with_a_trainer_it_is_what_the_trainer_validates(has_run, limit):
    torch.manual_seed(0)
    model, policy = Loaded(), {"default": "bf16", "net.4": "fp32"}
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=limit, num_sanity_val_steps=0)
    if has_run:
        trainer.fit(model)
    comparison = compare(model, {"mixed": policy}, trainer=trainer, repeats=1)
    plugin = PerLayerPrecision(policy)
    (validated,) = quiet_trainer(plugins=plugin, limit_val_batches=limit).validate(model, verbose=False)
    (row,) = comparison.rows
    assert comparison.step == "validation_step" and comparison.batches == (3 if limit == 3 else 5)
    assert {name: row[name] for name in validated} == pytest.approx(validated, rel=1e-6)
    assert validated.keys() == {"val_loss", "val_accuracy", "own_accuracy", "epoch_mean"}


def test_of_several_loaders_names_tell_which_as_the_trainers_do():
    class Several(Loaded):
        def val_dataloader(self):
            return [DataLoader(class_batches(2, seed=seed), batch_size=None) for seed in (1, 2)]

        def validation_step(self, batch, batch_idx, dataloader_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("val_loss", loss)
            return loss * (1 + dataloader_idx)

        def on_validation_epoch_end(self):
            pass

    torch.manual_seed(0)
    model = Several()
    comparison = compare(model, {"fp32": "fp32"}, trainer=quiet_trainer(), repeats=1)
    first, second = quiet_trainer().validate(model, verbose=False)
    (row,) = comparison.rows
    assert {name: row[name] for name in {**first, **second}} == pytest.approx({**first, **second}, rel=1e-6)
    losses = [row["val_loss/dataloader_idx_0"], 2 * row["val_loss/dataloader_idx_1"]]
    assert comparison.batches == 4 and row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_a_trainer_of_a_run_under_the_plugin_compares_when_it_is_over():
    torch.manual_seed(0)
    model, policy = Loaded(), {"default": "bf16", "net.4": "fp32"}
    trainer = quiet_trainer(max_epochs=1, plugins=PerLayerPrecision(policy), num_sanity_val_steps=0)
    for has_run in (False, True):
        state = copy.deepcopy(model.state_dict())
        (row,) = compare(model, {"mixed": policy}, trainer=trainer, repeats=1).rows
        assert same(model.state_dict(), state)
        if not has_run:
            trainer.fit(model)
    (validated,) = trainer.validate(model, verbose=False)
    assert {name: row[name] for name in validated} == pytest.approx(validated, rel=1e-6)


def test_a_module_that_a_trainer_has_to_set_up_is_set_up():
    class Late(Loaded):
        def __init__(self):
            super().__init__()
            self.made, self.net = self.net, None

        def configure_model(self):
            self.net = self.made

    assert compare(Late(), {"fp32": "fp32"}, trainer=quiet_trainer(), repeats=1).rows[0]["loss_gap"] == 0


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.moved = 0

    def setup(self, stage):
        self.batches = class_batches(3)

    def val_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved += 1
        return batch[0] * 2, batch[1]


def test_batches_may_be_a_datamodule_whose_hooks_move_them(model):
    data = Data()
    comparison = compare(model, {"bf16": "bf16"}, data, repeats=1, emulate=False)
    doubled = [(2 * x, y) for x, y in class_batches(3)]
    assert data.moved == 3
    assert comparison.reference["loss"] == math.fsum(by_hand(model, doubled, None)[0]) / 3


# Two checkpoints


def test_two_runs_are_compared_by_their_checkpoints(model):
    torch.manual_seed(1)
    other = Classifier()
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(other, DataLoader(class_batches(2), batch_size=None))
    trainer.save_checkpoint("mixed.ckpt")
    batches, state = class_batches(), copy.deepcopy(model.state_dict())
    weights = {"mixed": "mixed.ckpt", "reference": model.state_dict()}
    comparison = compare(model, {"mixed": "bf16"}, batches, weights=weights, repeats=1, emulate=False)
    low, exact = by_hand(other, batches, torch.bfloat16)[0], by_hand(model, batches, None)[0]
    assert comparison.rows[0]["loss"] == math.fsum(low) / len(low)
    assert comparison.reference["loss"] == math.fsum(exact) / len(exact)
    assert same(model.state_dict(), state) and not comparison.same_weights


def test_manual_optimization_has_the_losses_that_would_go_backward(model):
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    manual, batches = Manual(copy.deepcopy(model.net)), class_batches()
    state = copy.deepcopy(manual.state_dict())
    comparison = compare(manual, {"bf16": "bf16"}, batches, repeats=1, emulate=False)
    low = by_hand(model, batches, torch.bfloat16)[0]
    assert comparison.rows[0]["loss"] == math.fsum(low) / len(low)
    assert same(manual.state_dict(), state)


def test_a_loss_that_overflows_is_told_and_is_never_best():
    class Spiking(Classifier):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) @ torch.full((4, 4), 1e5)).square().mean()

    model = Spiking()
    comparison = compare(model, {"fp16": "fp16", "fp32": "fp32"}, class_batches(), repeats=1)
    assert not math.isfinite(comparison.rows[0]["loss_gap"])
    assert comparison.best(1e30) == "fp32"
    assert comparison.notes[0] == "'fp16': no finite loss on 6 of 6 batches, the first is 0"


def test_a_reference_that_is_not_finite_is_told_with_the_way_to_find_out(model):
    batches = class_batches(3)
    batches[1][0][0, 0] = math.nan
    comparison = compare(model, {"bf16": "bf16"}, batches, repeats=1)
    assert math.isnan(comparison.rows[0]["loss_gap"]) and comparison.best(1e30) is None
    told = comparison.notes[0]
    assert told.startswith("'fp32': no finite loss on 1 of 3 batches, the first is 1: without a reference")
    assert "diagnose(module, batch, 'fp32')" in told and told in str(comparison)


class Penalized(Classifier):
    """Takes the gradient of its outputs in its inputs, and counts its batches in a metric."""

    def __init__(self, net=None):
        super().__init__(net)
        self.count = torchmetrics.SumMetric()

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        self.count.update(1.0)
        logits = self.net(x)
        (slope,) = torch.autograd.grad(logits.float().square().sum(), x, create_graph=True)
        return nn.functional.cross_entropy(logits, batch[1]) + slope.square().mean() + 0 * self.count.compute()

    validation_step = training_step

    def on_validation_epoch_end(self):
        self.log("batches", self.count.compute())


@pytest.mark.parametrize("step", ["training", "validation"])
def test_a_step_that_takes_gradients_itself_is_run_with_them(step):
    torch.manual_seed(0)
    model, batches = Penalized(), class_batches(3)
    comparison = compare(model, {"bf16": "bf16"}, batches, step=step, repeats=1, emulate=False)
    for row, dtype in ((comparison.reference, None), (comparison.rows[0], torch.bfloat16)):
        losses, evaluated = [], copy.deepcopy(model).eval()
        for batch in batches:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                losses.append(float(evaluated.training_step(batch, 0).detach()))
        assert row["loss"] == math.fsum(losses) / len(losses)
        assert step == "training" or row["batches"] == 3.0  # each batch once
    assert any("takes gradients itself" in note for note in comparison.notes)
    assert all(param.grad is None for param in model.parameters()) and model.count.update_count == 0


# Mistakes


def bad(match, *arguments, **options):
    with pytest.raises(MixPrecError, match=match) as caught:
        compare(*arguments, **options)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("compare\\(\\) got a Linear", {"module": nn.Linear(2, 2)}),
        ("write a mapping from a name", {"policies": "bf16"}),
        ("looks like one policy", {"policies": {"default": "bf16", "net": "fp32"}}),
        ("the name 'reference'", {"policies": {"reference": "bf16"}}),
        ("policy 'a': .*bfloat16", {"policies": {"a": "bfloat16"}}),
        ("policy 'a': .*did you mean net", {"policies": {"a": {"default": "bf16", "nets": "fp32"}}}),
        ("there are no batches; give batches", {"batches": None}),
        ("there are no batches to compare on", {"batches": []}),
        ("batches is a dict", {"batches": {}}),
        (r"batches is a Tensor; .*\[batch\] for a single one", {"batches": torch.ones(4, 8)}),
        ("repeats is 0", {"repeats": 0}),
        ("max_batches is 'all'", {"max_batches": "all"}),
        ("step is 'test'", {"step": "test"}),
        ("emulate is 'yes'", {"emulate": "yes"}),
        ("trainer is a str", {"trainer": "cpu"}),
        ("weights has 'b'", {"weights": {"b": "x.ckpt"}}),
        ("'x.ckpt' cannot be read", {"weights": {"a": "x.ckpt"}}),
        ("the weights of 'a' are not those of Classifier", {"weights": {"a": {"net.0.weight": torch.ones(2)}}}),
        ("the weights of 'a' are a int", {"weights": {"a": 3}}),
        ("metric 'str' is a str", {"metric": "accuracy"}),
        ("gives a tensor of shape \\(4,\\)", {"metric": {"each": lambda output, batch: torch.ones(4)}}),
        ("policy 'fp32': the step could not be run: RuntimeError", {"batches": [(torch.ones(2, 3), torch.ones(2))]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(model, match, changes):
    arguments = {"module": model, "policies": {"a": "bf16"}, "batches": class_batches(2), "repeats": 1, **changes}
    bad(match, **arguments)


def test_a_metric_without_targets_says_what_to_give(model):
    metric = torchmetrics.classification.MulticlassAccuracy(4)

    class Unlabelled(Classifier):
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

    bad("needs targets", Unlabelled(), {"a": "bf16"}, [x for x, _ in class_batches(2)], metric=metric)


def test_a_step_without_a_loss_says_what_to_return(model):
    class Lossless(Classifier):
        def training_step(self, batch, batch_idx):
            return None

        def validation_step(self, batch, batch_idx):
            self.log("accuracy", 0.5)

    bad("training_step returns no loss", Lossless(), {"a": "bf16"}, class_batches(2))
    bad("it logs accuracy", Lossless(), {"a": "bf16"}, class_batches(2), step="validation")


def test_where_validation_gives_no_loss_training_step_is_run_on_its_data():
    class Accuracy(Loaded):
        def validation_step(self, batch, number):
            self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    model = Accuracy()
    comparison = compare(model, {"a": "bf16"}, trainer=quiet_trainer(), repeats=1)
    by_hand = compare(model, {"a": "bf16"}, list(model.val_dataloader()), repeats=1)
    assert comparison.step == "training_step" and comparison.rows[0]["loss"] == by_hand.rows[0]["loss"]
    bad("it logs val_accuracy", model, {"a": "bf16"}, trainer=quiet_trainer(), step="validation")


def test_a_step_that_asks_for_its_trainer_is_told_to_be_given_one(model):
    class Asking(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.trainer.max_epochs

    bad(
        "training_step asks for its Trainer .* compare\\(\\) has none; give it trainer=",
        Asking(),
        {"a": "bf16"},
        class_batches(2),
    )
    compare(Asking(), {"a": "bf16"}, class_batches(2), trainer=quiet_trainer(max_epochs=2), step="training", repeats=1)


def test_a_policy_may_be_anything_that_the_plugin_takes(model):
    PrecisionPolicy("bf16").to_file("policy.yaml")
    policies = {
        "name": "bf16",
        "file": "policy.yaml",
        "object": PrecisionPolicy("bf16"),
        "mapping": {"default": "bf16"},
        "plugin": PerLayerPrecision("bf16"),
        "plan": plan(model, class_batches(1), device="h100").solve({"low_precision_share": 1.0}),
    }
    comparison = compare(model, policies, class_batches(2), repeats=1)
    losses = {row["policy"]: row["loss"] for row in comparison.rows}
    assert len({loss for name, loss in losses.items() if name != "plan"}) == 1
    assert losses["plan"] == pytest.approx(losses["name"], rel=1e-2)


def test_within_a_run_it_leaves_the_run_alone():
    """A callback may compare between steps of a run in stock precision; what is logged is the run's own."""

    class Comparing(pl.Callback):
        found = None

        def on_train_end(self, trainer, module):
            self.found = compare(module, {"bf16": "bf16"}, class_batches(2), repeats=1)

    def run(callbacks):
        torch.manual_seed(0)
        model = Classifier()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=3,
            logger=CSVLogger("."),
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, DataLoader(class_batches(3), batch_size=None))
        return model.state_dict()

    callback = Comparing()
    assert same(run([callback]), run([])) and callback.found.rows


def test_within_a_run_under_the_plugin_it_says_when_to_call_it():
    class Comparing(pl.Callback):
        def on_train_end(self, trainer, module):
            bad("call it when the run is over", module, {"bf16": "bf16"}, class_batches(2))
            self.was_called = True

    callback, model = Comparing(), Classifier()
    trainer = quiet_trainer(max_steps=1, callbacks=[callback], plugins=PerLayerPrecision("bf16"))
    trainer.fit(model, DataLoader(class_batches(2), batch_size=None))
    assert callback.was_called
    assert compare(model, {"bf16": "bf16"}, class_batches(2), repeats=1).rows


def test_weights_in_16_bits_are_widened_for_the_reference_and_come_back(model):
    model, batches = model.bfloat16(), [(x.bfloat16(), y) for x, y in class_batches()]
    comparison = compare(model, {"bf16": "bf16"}, batches, repeats=1, emulate=False)
    wide = copy.deepcopy(model).float()
    exact = by_hand(wide, [(x.float(), y) for x, y in batches], None)[0]
    assert comparison.reference["loss"] == math.fsum(exact) / len(exact)
    assert model.net[0].weight.dtype == torch.bfloat16 and comparison.rows[0]["loss_gap"] != 0


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_on_cuda_a_uniform_policy_is_a_loop_under_autocast_bit_for_bit(model, format):
    model, batches = model.cuda(), [(x.cuda(), y.cuda()) for x, y in class_batches()]
    comparison = compare(model, {"it": format}, class_batches(), repeats=1)  # on the CPU: they are moved
    evaluated, losses = copy.deepcopy(model).eval(), []
    for x, y in batches:
        with torch.no_grad(), torch.autocast("cuda", DTYPES[format]):
            losses.append(float(nn.functional.cross_entropy(evaluated.net(x), y)))
    (row,) = comparison.rows
    assert row["loss"] == math.fsum(losses) / len(losses)
    assert comparison.reference["bytes"] > 0 and row["memory_ratio"] > 0
