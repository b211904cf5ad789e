"""What a plan is worth: its loss gap beside that of rules of thumb and of chance, at the same cost.

    python examples/benchmarks/plans.py --output examples/benchmarks/results/plans-cpu.json

Four small models (a CNN, a GPT, a recurrent net, a recommender) are trained for some steps in fp32. Each rival, all in
bf16, the same with first and last layers in fp32, the same with norms in fp32, or formats at random, is predicted to
take some time and memory on an H100, and to have some share of the arithmetic in at most 16 bits. The plan is asked for
the least loss gap that takes no more of either and has no smaller share; that of bf16 alone has other formats at the
same cost to choose from. The loss gaps of both are then measured, on batches that the plan has not seen. At last the
plan that stands beside bf16 is trained with, and bf16, and fp32, from several seeds; a training's end is the mean loss
of its last quarter, of batches that are new in each step. Numbers depend on no clock.
"""

import contextlib
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from measuring import arguments, prepare, report, save
from planned_models import MODELS, trained
from planning import FORMATS, drawn, gap, steps
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mixprec import PerLayerPrecision, PrecisionPlan, PrecisionPolicy, plan
from lightning_mixprec.policy.rule_folding import folded_policy

DEVICE = "h100"
ROUNDING = 1e-7  # of a loss in fp32; a smaller gap means nothing
UNIFORM = "all bf16"

Formats = Mapping[str, str]


def rivals(model: pl.LightningModule, made: PrecisionPlan, count: int, seed: int) -> dict[str, Formats]:
    """Return formats by layer: of bf16, of two rules of thumb, and of some drawn at random."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    weighty = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    products = [name for name in weighty if any(cost.flops for cost in made.costs.layers[name].values())]
    wide: dict[str, Callable[[str], bool]] = {
        UNIFORM: lambda name: False,
        "first and last wide": lambda name: name in {weighty[0], products[0], weighty[-1]},
        "norms wide": lambda name: "Norm" in kinds[name],
    }
    usable = {name for layers in made.sensitivities.variables for name in layers}
    chosen: dict[str, Formats] = {
        kind: {name: "fp32" if is_wide(name) else "bf16" for name in usable} for kind, is_wide in wide.items()
    }
    at_random = drawn(made.sensitivities, count, seed)
    return chosen | {f"random {place}": formats for place, formats in enumerate(at_random)}


def cost_of(made: PrecisionPlan, formats: Formats) -> dict[str, float]:
    """Return what formats are predicted to take, as the budget of a plan that may take no more."""
    step = made.costs.of_step({name: formats.get(name, "fp32") for name in made.costs.layers})
    return {
        "time": step.seconds / made.reference.seconds,
        "memory": step.memory_bytes / made.reference.memory_bytes,
        "low_precision_share": step.low_precision_share,
    }


def compared(name: str, options: Any) -> dict[str, Any]:
    """Return the measured loss gaps of a model's rivals, each beside the plan's of the same cost."""
    model = trained(name, options.trained_for, options.seed)
    made = plan(model, model.batches(options.batches, options.seed + 1), formats=options.formats, device=DEVICE,
                max_batches=options.batches)  # fmt: skip
    unseen = model.batches(2 * options.batches, options.seed + 2)
    wide = steps(model, "fp32", unseen)
    known: dict[str, float] = {}

    def measured(formats: Formats) -> float:
        policy = folded_policy(model, {each: formats.get(each, "fp32") for each in made.layer_formats})
        if (key := str(policy.to_dict())) not in known:
            known[key] = gap(steps(model, policy, unseen), wide)
        return known[key]

    rows = []
    for rival, formats in rivals(model, made, options.assignments, options.seed).items():
        budget = cost_of(made, formats)
        ours = made.solve(budget)
        rows.append(
            {
                "rival": rival,
                "budget": budget,
                "gap": measured(formats),
                "plan_gap": measured(ours.layer_formats),
                "plan_predicted": ours.predicted.loss_gap,
                "plan_takes": cost_of(made, ours.layer_formats),
            }
        )
    against_uniform = made.solve(rows[0]["budget"])
    return {"model": name, "rivals": rows, "policy": against_uniform.policy.to_dict()} | endings(
        name, against_uniform.policy, options
    )


def endings(name: str, policy: PrecisionPolicy, options: Any) -> dict[str, Any]:
    """Return the losses at the end of trainings in fp32, in bf16 and under the plan, by seed."""
    kinds: dict[str, Any] = {"fp32": "fp32", UNIFORM: "bf16", "plan": policy}
    seeds = range(1, options.seeds + 1)
    return {"endings": {kind: [ending(name, given, seed, options) for seed in seeds] for kind, given in kinds.items()}}


def ending(name: str, policy: Any, seed: int, options: Any) -> float:
    """Return the mean loss of the last quarter of the steps of a training under a policy."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    losses: list[float] = []
    step = model.training_step
    model.training_step = lambda batch, batch_idx: kept(losses, step(batch, batch_idx))  # type: ignore[method-assign]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet,
                         plugins=PerLayerPrecision(policy))  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(model, DataLoader(model.batches(options.training_steps, 1000 * seed), batch_size=None))
    return statistics.fmean(losses[-max(len(losses) // 4, 1) :])


def kept(losses: list[float], loss: Tensor) -> Tensor:
    """Return a loss that was noted."""
    losses.append(float(loss.detach()))
    return loss


def ratio(row: Mapping[str, Any]) -> float:
    """Return how many times the plan's loss gap a rival's is."""
    return max(row["gap"], ROUNDING) / max(row["plan_gap"], ROUNDING)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines as a table: loss gaps, then losses after training."""
    rows = [f"{'model':12}  {'beside':20}{'loss gap':>10}{'plan':>10}{'times':>8}"]
    for line in lines:
        for row in line["rivals"]:
            if not row["rival"].startswith("random"):
                told = f"{row['gap']:10.1e}{row['plan_gap']:10.1e}{ratio(row):8.2f}"
                rows.append(f"{line['model']:12}  {row['rival']:20}{told}")
        drawn_ones = [ratio(row) for row in line["rivals"] if row["rival"].startswith("random")]
        worse = sum(each > 1 for each in drawn_ones)
        rows.append(f"{line['model']:12}  {worse} of {len(drawn_ones)} at random are worse; median "
                    f"{statistics.median(drawn_ones):.2f} times")  # fmt: skip
    rows.append(f"\n{'model':12}  end of training (mean of seeds; plan - bf16 by seed; deviation of fp32's seeds)")
    for line in lines:
        ends = line["endings"]
        means = ", ".join(f"{kind} {statistics.fmean(found):.4f}" for kind, found in ends.items())
        apart = " ".join(f"{a - b:+.4f}" for a, b in zip(ends["plan"], ends[UNIFORM], strict=True))
        spread = statistics.stdev(ends["fp32"]) if len(ends["fp32"]) > 1 else math.nan
        rows.append(f"{line['model']:12}  {means}; {apart}; {spread:.4f}")
    return "\n".join(rows)


def main() -> None:
    """Compare, print, and write what was found."""
    parser = arguments(__doc__ or "", FORMATS, rounds=1, steps=1, models=tuple(MODELS))
    parser.add_argument("--assignments", type=int, default=20, help="rivals at random")
    parser.add_argument("--batches", type=int, default=6, help="that plans are made on; twice as many are measured")
    parser.add_argument("--trained-for", type=int, default=100, help="steps before a plan is made")
    parser.add_argument("--training-steps", type=int, default=200, help="of the trainings that are compared")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    prepare(options)
    if options.quick:
        options.assignments, options.batches, options.trained_for, options.training_steps, options.seeds = 2, 2, 3, 3, 1
    lines: list[dict[str, Any]] = []
    for name in options.models:
        lines.append(compared(name, options))
        save(lines, options)
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
