"""Measure what PerLayerPrecision costs beside Lightning's own precision plugins, in time and in memory.

    python examples/benchmarks/overhead.py --device cpu --output examples/benchmarks/results/overhead-cpu.json
    python examples/benchmarks/overhead.py --device cuda --output examples/benchmarks/results/overhead-cuda.json

Every case is a real Trainer.fit. A round runs a block of steps of each case, in an order shuffled anew; a case's ratio
is its median step over the median step of Lightning's plugin in the same round, and the table gives the median of
these ratios over the rounds with their quartiles. The null ratio is Lightning's plugin against itself.
"""

import argparse
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from lightning.pytorch import Callback
from measuring import Inspector, Profiler, Stopwatch, arguments, judged, prepare, report, save, spread, train, written
from workloads import Case, Repeated, Task

LOOKED_AT = 8
"""Steps at the start of a run whose gradients the plugin looks at twice, for hooks that hide infinite ones."""


@dataclass
class Result:
    """What was measured of a case: seconds per step and CPU seconds per step, by round, and what one run tells."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loss: float = float("nan")
    memory_bytes: int = 0
    host_reads_per_step: float = 0.0


def fit(case: Case, steps: int, callback: Callback, options: argparse.Namespace) -> Task:
    """Train a new model for some steps in a new Trainer."""
    task = Task(case, options.quick, options.device)
    train(task, case.plugin(options.device), Repeated(task.batch, steps), [callback], options.device)
    return task


def cases(options: argparse.Namespace) -> list[list[Case]]:
    """Return the groups of cases that are compared with each other: one model, optimizer and format each."""
    groups = []
    for model in options.models:
        for fused in {"no": [False], "yes": [True], "both": [False, True]}[options.fused]:
            for name in options.formats:
                if (options.device, model, name) == ("cpu", "resnet18", "fp16"):
                    continue  # a CPU takes seconds for a step in fp16
                kinds = ["stock", "again", "uniform"]
                kinds += ["unguarded"] if name != "fp16" else []  # the loss scaler's check cannot be switched off
                kinds += ["mixed"] if name == "bf16" else []
                groups.append([Case(model, fused, name, kind) for kind in kinds])
    return groups


def block_lengths(case: Case, options: argparse.Namespace) -> tuple[int, int]:
    """Return the steps of a block that are not timed and those that are: a CPU takes long for a ResNet-18."""
    slow = 4 if (case.model, options.device) == ("resnet18", "cpu") else 1
    return max(LOOKED_AT, options.warmup // slow), max(2, options.steps // slow)


def measure(groups: list[list[Case]], options: argparse.Namespace) -> dict[Case, Result]:
    """Inspect every case once, then time all of them in every round."""
    results = {case: Result() for group in groups for case in group}
    for case, result in results.items():
        inspector = Inspector(LOOKED_AT + 1, options.device)
        result.loss = fit(case, LOOKED_AT + 3, inspector, options).last_loss.item()
        result.memory_bytes, result.host_reads_per_step = inspector.memory_bytes, inspector.host_reads
    shuffler = random.Random(options.seed)
    for number in range(options.rounds):
        for group in shuffler.sample(groups, len(groups)):
            for case in shuffler.sample(group, len(group)):
                warmup, steps = block_lengths(case, options)
                stopwatch = Stopwatch(range(warmup, warmup + steps + 1, options.stride), options.device)
                fit(case, warmup + steps + 1, stopwatch, options)
                wall, cpu = stopwatch.spans()
                results[case].wall.append(statistics.median(wall))
                results[case].cpu.append(statistics.median(cpu))
        print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
        save(list(rows(results)), options)
    print()
    return results


def print_profiles(groups: list[list[Case]], options: argparse.Namespace) -> None:
    """Print where the Python time goes for all cases of one kind."""
    for case in (case for group in groups for case in group if case.kind == options.profile):
        profiler = Profiler(options.warmup, options.warmup + options.steps)
        fit(case, options.warmup + options.steps + 1, profiler, options)
        profiler.print(str(case))


def rows(results: dict[Case, Result]) -> Iterator[dict]:
    """Yield what the table and the JSON say of each case."""
    for case, result in results.items():
        stock = results[case.baseline]
        yield asdict(case) | {
            "step_ms": statistics.median(result.wall) * 1e3,
            "ratio": spread(result.wall, stock.wall),
            "cpu_time_ratio": spread(result.cpu, stock.cpu),
            "null_ratio": spread(results[Case(**asdict(case) | {"kind": "again"})].wall, stock.wall),
            "target": case.target,
            "memory_bytes": result.memory_bytes,
            "memory_ratio": result.memory_bytes / stock.memory_bytes,
            "host_reads_per_step": result.host_reads_per_step,
            "loss_equals_stock": result.loss == stock.loss,
        }


def table(lines: list[dict]) -> str:
    """Return the rows as text."""
    head = ("case", "step", "ratio", "null ratio", "target", "CPU time", "memory", "reads", "same loss")
    layout = "{:<29}{:>11}  {:<21}{:<21}{:<13}{:>8}{:>9}{:>7}  {}"
    out = [layout.format(*head)]
    for line in lines:
        name = f"{line['model']} {'fused ' * line['fused']}{line['format']} {line['kind']}"
        ours = line["kind"] not in ("stock", "again")
        ratio = line["ratio"]
        out.append(
            layout.format(
                name,
                f"{line['step_ms']:.2f} ms",
                written(ratio) if ours else "",
                written(line["null_ratio"]) if line["kind"] != "stock" else "",
                judged(ratio, line["target"]),
                f"{line['cpu_time_ratio']['median']:.3f}" if ours else "",
                f"{line['memory_ratio']:.4f}",
                line["host_reads_per_step"],
                "yes" if line["loss_equals_stock"] else "no",
            ).rstrip()
        )
    return "\n".join(out)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, formats=["fp32", "bf16", "fp16"], rounds=20, steps=40)
    parser.add_argument("--fused", choices=["no", "yes", "both"], help="fused optimizers (default: both on CUDA)")
    parser.add_argument("--stride", type=int, help="steps between two readings of the clock (default: 1, on CUDA 10)")
    options = parser.parse_args()
    options.fused = options.fused or ("both" if options.device == "cuda" else "no")
    options.stride = options.stride or (10 if options.device == "cuda" else 1)
    if options.quick:
        options.rounds, options.steps, options.warmup, options.stride = 2, 4, 2, 1
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    prepare(options)
    groups = cases(options)
    if options.profile:
        print_profiles(groups, options)
        return
    lines = list(rows(measure(groups, options)))
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
