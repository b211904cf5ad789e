"""Measure what PerLayerPrecision costs beside Lightning's own precision plugins, in time and in memory.

    python examples/benchmarks/overhead.py --device cpu --output examples/benchmarks/results/overhead-cpu.json
    python examples/benchmarks/overhead.py --device cuda --output examples/benchmarks/results/overhead-cuda.json

Every case is a real Trainer.fit. A round runs a block of steps of each case, in an order shuffled anew; a case's ratio
is its median step over the median step of Lightning's plugin in the same round, and the table gives the median of
these ratios over the rounds with their quartiles. The null ratio is Lightning's plugin against itself.
"""

import argparse
import contextlib
import cProfile
import gc
import io
import json
import logging
import os
import platform
import pstats
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Case, Repeated, Task


@dataclass
class Result:
    """What was measured of a case: seconds per step and CPU seconds per step, by round, and what one run tells."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loss: float = float("nan")
    memory_bytes: int = 0
    host_reads_per_step: float = 0.0


class Stopwatch(Callback):
    """Takes the time from the start of one step to the start of a later one, after the warm-up.

    Args:
        warmup: steps that are not timed.
        stride: steps between two readings; on CUDA each reading waits for the device, so it must not be 1.
    """

    def __init__(self, warmup: int, stride: int, device: str) -> None:
        self.warmup, self.stride, self.device = warmup, stride, device
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Read the clocks."""
        if batch_idx >= self.warmup and (batch_idx - self.warmup) % self.stride == 0:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())

    def medians(self) -> tuple[float, float]:
        """Return the median wall and CPU seconds of a step."""
        wall, cpu = (
            statistics.median(later - now for now, later in zip(times, times[1:], strict=False)) / self.stride
            for times in (self.wall, self.cpu)
        )
        return wall, cpu


class ScalarReads(TorchDispatchMode):
    """Counts the scalars that Python reads from tensors: on CUDA each would wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Inspector(Callback):
    """Looks at the last step of a fit: host reads, and peak memory (CUDA) or the bytes saved for backward (CPU)."""

    def __init__(self, step: int, device: str) -> None:
        self.step, self.device = step, device
        self.stack = contextlib.ExitStack()
        self.storages: dict[int, int] = {}
        self.memory_bytes = self.host_reads = 0

    def on_train_batch_start(self, trainer: Trainer, module: Task, batch: object, batch_idx: int) -> None:
        """Begin to count."""
        if batch_idx != self.step:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.caught = self.stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        else:
            own = {p.untyped_storage().data_ptr() for p in module.parameters()}
            module.saved = lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: self._note(t, own), lambda t: t)
            self.reads = self.stack.enter_context(ScalarReads())

    def on_train_batch_end(
        self, trainer: Trainer, module: Task, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Stop counting."""
        if batch_idx != self.step:
            return
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self.memory_bytes = torch.cuda.max_memory_allocated()
            self.host_reads = sum("synchronizing CUDA" in str(w.message) for w in self.caught)
        else:
            self.memory_bytes, self.host_reads = sum(self.storages.values()), self.reads.count
        self.stack.close()

    def _note(self, tensor: Tensor, own: set[int]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def fit(case: Case, steps: int, callback: Callback, options: argparse.Namespace) -> Task:
    """Train a new model for some steps in a new Trainer, which logs, saves and prints nothing."""
    task = Task(case, options.quick, options.device)
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        plugins=[case.plugin(options.device)],
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(task, Repeated(task.batch, steps))
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
    return max(2, options.warmup // slow), max(2, options.steps // slow)


def measure(groups: list[list[Case]], options: argparse.Namespace) -> dict[Case, Result]:
    """Inspect every case once, then time all of them in every round."""
    results = {case: Result() for group in groups for case in group}
    for case, result in results.items():
        inspector = Inspector(step=4, device=options.device)
        result.loss = fit(case, 5, inspector, options).last_loss.item()
        result.memory_bytes, result.host_reads_per_step = inspector.memory_bytes, inspector.host_reads
    shuffler = random.Random(options.seed)
    for number in range(options.rounds):
        for group in shuffler.sample(groups, len(groups)):
            for case in shuffler.sample(group, len(group)):
                warmup, steps = block_lengths(case, options)
                stopwatch = Stopwatch(warmup, options.stride, options.device)
                fit(case, warmup + steps + 1, stopwatch, options)
                wall, cpu = stopwatch.medians()
                results[case].wall.append(wall)
                results[case].cpu.append(cpu)
        print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
    print()
    return results


class Profiler(Callback):
    """Profiles the Python of all steps after the warm-up."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.profile = warmup, cProfile.Profile()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Begin."""
        if batch_idx == self.warmup:
            self.profile.enable()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop."""
        self.profile.disable()


def print_profiles(groups: list[list[Case]], options: argparse.Namespace) -> None:
    """Print where the Python time goes for all cases of one kind."""
    for case in (case for group in groups for case in group if case.kind == options.profile):
        profiler = Profiler(options.warmup)
        fit(case, options.warmup + options.steps, profiler, options)
        print(f"{case}: {options.steps} steps")
        pstats.Stats(profiler.profile).strip_dirs().sort_stats("tottime").print_stats(20)


def spread(ours: list[float], stock: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios of two cases, round by round."""
    ratios = [a / b for a, b in zip(ours, stock, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


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


def written(ratio: dict[str, float]) -> str:
    """Return a ratio as median [lower quartile, upper quartile]."""
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def table(lines: list[dict]) -> str:
    """Return the rows as text."""
    head = ("case", "step", "ratio", "null ratio", "target", "CPU time", "memory", "reads", "same loss")
    layout = "{:<29}{:>11}  {:<21}{:<21}{:<13}{:>8}{:>9}{:>7}  {}"
    out = [layout.format(*head)]
    for line in lines:
        name = f"{line['model']} {'fused ' * line['fused']}{line['format']} {line['kind']}"
        ours = line["kind"] not in ("stock", "again")
        target, ratio = line["target"], line["ratio"]
        out.append(
            layout.format(
                name,
                f"{line['step_ms']:.2f} ms",
                written(ratio) if ours else "",
                written(line["null_ratio"]) if line["kind"] != "stock" else "",
                f"{target:.2f} {'met' if ratio['median'] <= target else 'missed'}" if target else "",
                f"{line['cpu_time_ratio']['median']:.3f}" if ours else "",
                f"{line['memory_ratio']:.4f}",
                line["host_reads_per_step"],
                "yes" if line["loss_equals_stock"] else "no",
            ).rstrip()
        )
    return "\n".join(out)


def machine(options: argparse.Namespace) -> dict:
    """Return what the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    git = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "commit": git.stdout.strip() or None,
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=["tiny", "resnet18"], default=["tiny", "resnet18"])
    parser.add_argument("--formats", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16", "fp16"])
    parser.add_argument("--fused", choices=["no", "yes", "both"], help="fused optimizers (default: both on CUDA)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40, help="timed steps in a block")
    parser.add_argument("--warmup", type=int, default=10, help="steps before a block is timed")
    parser.add_argument("--stride", type=int, help="steps between two readings of the clock (default: 1, on CUDA 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the cases")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is disturbed least by other programs")
    parser.add_argument("--profile", metavar="KIND", help="print profiles of a kind of case and measure nothing else")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it runs: the numbers mean nothing"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.fused = options.fused or ("both" if options.device == "cuda" else "no")
    options.stride = options.stride or (10 if options.device == "cuda" else 1)
    if options.quick:
        options.rounds, options.steps, options.warmup, options.stride = 2, 4, 2, 1
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    groups = cases(options)
    if options.profile:
        print_profiles(groups, options)
        return
    lines = list(rows(measure(groups, options)))
    about = machine(options)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    print(table(lines))
    if options.output is not None:
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps({"machine": about, "settings": settings, "results": lines}, indent=1) + "\n"
        )
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
