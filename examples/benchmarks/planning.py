"""Check what sensitivities promise: predicted loss gaps of mixed formats beside measured ones, on four small models.

    python examples/benchmarks/planning.py --output examples/benchmarks/results/planning-cpu.json

Sensitivities of a model are measured on some batches. Then its layers are given formats at random, with chances that
are drawn anew for each assignment: some are nearly all fp32, others nearly all fp8. The loss of each batch is computed
under each assignment and in fp32, with the same random numbers. The measured gap is the root of the mean squared
difference over the batches, the predicted one the root of the sum of the layers' sensitivities. The table has the rank
correlation of the two (the target is 0.9), their ratio (the target is a median of 0.5 to 2), and the rank correlation
of the predicted gap with how far the weights' gradient turns (1 - cosine), to which backward adds, too.

A second table asks whether a term for the rounding of backward (``backward_parts.py``) would improve either: it has the
rank correlations of the forward's parts alone, of the backward's alone, and of both, each in units of its median, with
the factor for the second that is best for that very line, which is more than one chosen beforehand can reach.
"""

import math
import multiprocessing
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from backward_parts import parts_of_batch, summed
from measuring import arguments, prepare, report
from planned_models import MODELS, trained
from scipy.stats import spearmanr
from torch import Tensor

from lightning_mixprec import PrecisionPolicy, Rule
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.measuring.sensitivities import measure_sensitivities
from lightning_mixprec.evidence.replay import Replayed, StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats
from lightning_mixprec.planning.sensitivity import Sensitivities
from lightning_mixprec.policy.patterns import literal

FORMATS = ["bf16", "fp16", "fp8", "int8"]
REFERENCE = "fp32"
LEAST_CORRELATION, RATIOS = 0.9, (0.5, 2.0)
FACTORS = [4.0**power for power in range(-5, 6)]
LOSS_SCALE = 2.0**10  # the gradients' alone; losses are as they are

Formats = Mapping[str, str]


def drawn(sensitivities: Sensitivities, count: int, seed: int) -> Iterator[Formats]:
    """Yield random formats by layer; each assignment has chances of its own for the formats."""
    generator = random.Random(seed)
    for _ in range(count):
        chances = {format: generator.gammavariate(0.5, 1.0) for format in [REFERENCE, *FORMATS]}
        formats: dict[str, str] = {}
        for layers, offers in zip(sensitivities.variables, sensitivities.offers, strict=True):
            usable = [format for format, offer in offers.items() if offer.problem is None]
            chosen = generator.choices(usable, [chances[format] for format in usable])[0]
            formats |= dict.fromkeys(layers, chosen)
        yield formats


def policy_of(formats: Formats, sensitivities: Sensitivities) -> PrecisionPolicy:
    """Return the policy that gives each layer's own operations its format."""
    first = [layers[0] for layers in sensitivities.variables]
    narrow = [(name, formats[name]) for name in first if formats[name] != REFERENCE]
    return PrecisionPolicy(REFERENCE, [Rule(literal(name), compute=format, recurse=False) for name, format in narrow])


def steps(model: Any, policy: Any, batches: Sequence[Any]) -> list[Replayed]:
    """Run the model's step on each batch under a policy, without a trace."""
    formats = PolicyFormats(model, policy, model.device, LOSS_SCALE)
    replay, before = StepReplay(model, formats, model.device), RandomState(model.device)
    torch.manual_seed(0)
    random_numbers = RandomState(model.device)
    before.restore()
    with replay.opened(reference=policy == REFERENCE) as stand_ins:
        scale = float(formats.scale)
        return [replay.run(stand_ins, batch, 0, scale=scale, random=random_numbers) for batch in batches]


def gap(low: Sequence[Replayed], wide: Sequence[Replayed]) -> float:
    """Return the root over batches of the mean squared loss gap."""
    gaps = [float(one.losses[0]) - float(other.losses[0]) for one, other in zip(low, wide, strict=True)]
    return math.sqrt(sum(each * each for each in gaps) / len(gaps))


def turned(low: Sequence[Replayed], wide: Sequence[Replayed]) -> float:
    """Return 1 - the cosine between the weights' gradients, in the mean over batches."""
    pairs = [(flat(one), flat(other)) for one, other in zip(low, wide, strict=True)]
    return sum(1 - float(torch.cosine_similarity(one, other, dim=0)) for one, other in pairs) / len(pairs)


def flat(replayed: Replayed) -> Tensor:
    """Return a step's gradients of all weights as one vector."""
    return torch.cat([replayed.gradients[name].double().flatten() for name in sorted(replayed.gradients)])


def check(name: str, trained_for: int, assignments: int, batches: int, seed: int) -> dict[str, Any]:
    """Compare predicted and measured gaps of one model."""
    model = trained(name, trained_for, seed)
    data = model.batches(batches, seed + 1)
    sensitivities = measure_sensitivities(model, data, FORMATS, seed=0)
    wide = steps(model, REFERENCE, data)
    parts = [parts_of_batch(model, batch, sensitivities) for batch in data]
    points = []
    for formats in drawn(sensitivities, assignments, seed):
        low = steps(model, policy_of(formats, sensitivities), data)
        predicted = math.sqrt(sensitivities.squared_gap(formats))
        share = sum(format != REFERENCE for format in formats.values()) / len(formats)
        point = {"predicted": predicted, "measured": gap(low, wide), "turned": turned(low, wide), "narrow": share}
        points.append(point | {"backward": summed(parts, formats)})
    return {"model": name, "steps": trained_for, "variables": len(sensitivities.variables), "batches": batches} | {
        **told(points),
        "with_backward": {of: with_backward(points, of) for of in ("measured", "turned")},
        "points": points,
    }


def with_backward(points: Sequence[Mapping[str, float]], of: str) -> dict[str, float]:
    """Return rank correlations with what was measured: of the parts of each pass, and of both with the best factor."""
    forward, backward = [point["predicted"] ** 2 for point in points], [point["backward"] for point in points]
    units = statistics.median(forward) or 1.0, statistics.median(backward) or 1.0
    measured = [point[of] for point in points]

    def correlation(first: float, second: float) -> float:
        pairs = zip(forward, backward, strict=True)
        return float(spearmanr([first * one / units[0] + second * two / units[1] for one, two in pairs], measured)[0])

    both = {factor: correlation(1.0, factor) for factor in FACTORS}
    best = max(both, key=both.__getitem__)
    alone = {"forward": correlation(1.0, 0.0), "backward": correlation(0.0, 1.0)}
    return {**alone, "at_1": both[1.0], "best": both[best], "factor": best}


def told(points: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return what the points come to; those at which nothing changed in either count for the ranks alone."""
    predicted, measured = ([point[kind] for point in points] for kind in ("predicted", "measured"))
    ratios = sorted(one / other for one, other in zip(predicted, measured, strict=True) if one and other)
    at = {
        name: ratios[int(share * (len(ratios) - 1))] for name, share in (("low", 0.1), ("median", 0.5), ("high", 0.9))
    }
    turns = [point["turned"] for point in points]
    return {
        "assignments": len(points),
        "correlation": float(spearmanr(predicted, measured)[0]),
        "correlation_of_gradients": float(spearmanr(predicted, turns)[0]),
        "ratio": at,
        "measured": {"least": min(measured), "largest": max(measured)},
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines as a table."""
    rows = [f"{'model':13}{'steps':>6}{'variables':>11}{'correlation':>13}{'gradients':>11}  ratio (10 % to 90 %)"]
    for line in lines:
        ratio = line["ratio"]
        is_met = line["correlation"] >= LEAST_CORRELATION and RATIOS[0] <= ratio["median"] <= RATIOS[1]
        rows.append(
            f"{line['model']:13}{line['steps']:6}{line['variables']:11}{line['correlation']:13.3f}"
            f"{line['correlation_of_gradients']:11.3f}  "
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" + ("" if is_met else "  missed")
        )
    rows.append(f"\n{'model':13}{'of':>10}{'forward':>10}{'backward':>10}{'both, at 1':>12}{'at best':>9}  factor")
    for line in lines:
        for of, told_of in (("measured", "loss gap"), ("turned", "1 - cos")):
            each = line["with_backward"][of]
            rows.append(
                f"{line['model']:13}{told_of:>10}{each['forward']:10.3f}{each['backward']:10.3f}{each['at_1']:12.3f}"
                f"{each['best']:9.3f}  {each['factor']:g}"
            )
    return "\n".join(rows)


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments(__doc__ or "", FORMATS, rounds=1, steps=1, models=tuple(MODELS))
    parser.add_argument("--assignments", type=int, default=60)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--trained-for", type=int, nargs="+", default=[100], help="steps before it is measured")
    parser.add_argument("--processes", type=int, default=1, help="nothing is timed, so several are as good as one")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    prepare(options)
    if options.quick:
        options.assignments, options.batches, options.trained_for = 8, 2, [3]
    cases = [(name, steps) for name in options.models for steps in options.trained_for]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawned, initializer=prepare, initargs=(options,)) as pool:
        found = [pool.submit(check, *case, options.assignments, options.batches, options.seed) for case in cases]
        lines = [each.result() for each in found]
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
