"""How the benchmarks measure: clocks, counters and profiles as callbacks of a real Trainer.fit, and the report."""

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
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Repeated, Task


class Stopwatch(Callback):
    """Reads the clocks at the start of chosen steps.

    Has to be the first callback, so that what the others do in a step falls between its start and the next one's.

    Args:
        readings: indices of the steps; on CUDA each reading waits for the device, so they must not be all.
        device: cpu or cuda.
    """

    def __init__(self, readings: Sequence[int], device: str) -> None:
        self.readings, self.device = readings, device
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Read the clocks."""
        if batch_idx in self.readings:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())

    def spans(self) -> tuple[list[float], list[float]]:
        """Return the mean wall and CPU seconds of a step between each two readings."""
        wall, cpu = (
            [
                (later - now) / (stop - start)
                for now, later, start, stop in zip(times, times[1:], self.readings, self.readings[1:], strict=False)
            ]
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
    """Looks at one step: host reads, and peak memory (CUDA) or the bytes saved for backward (CPU).

    Has to be the first callback: it looks from the start of that step to the start of the next.
    """

    def __init__(self, step: int, device: str) -> None:
        self.step, self.device = step, device
        self.stack = contextlib.ExitStack()
        self.storages: dict[int, int] = {}
        self.memory_bytes = self.host_reads = 0

    def on_train_batch_start(self, trainer: Trainer, module: Task, batch: object, batch_idx: int) -> None:
        """Begin to count, or stop."""
        if batch_idx == self.step:
            self._begin(module)
        elif batch_idx == self.step + 1:
            self._end(module)

    def _begin(self, module: Task) -> None:
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

    def _end(self, module: Task) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self.memory_bytes = torch.cuda.max_memory_allocated()
            self.host_reads = sum("synchronizing CUDA" in str(w.message) for w in self.caught)
        else:
            self.memory_bytes, self.host_reads = sum(self.storages.values()), self.reads.count
            module.saved = contextlib.nullcontext
        self.stack.close()

    def _note(self, tensor: Tensor, own: set[int]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


class Profiler(Callback):
    """Profiles the Python of some steps; has to be the first callback."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.profile = start, stop, cProfile.Profile()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Begin, or stop."""
        if batch_idx == self.start:
            self.profile.enable()
        elif batch_idx == self.stop:
            self.profile.disable()

    def print(self, title: str, order: str = "tottime", rows: int = 20) -> None:
        """Print where the time goes, the most expensive functions first."""
        print(f"{title}: {self.stop - self.start} steps")
        pstats.Stats(self.profile).strip_dirs().sort_stats(order).print_stats(rows)


def train(
    task: Task, plugin: Precision, batches: Repeated, callbacks: Sequence[Callback], device: str, logger: Any = False
) -> None:
    """Train in a new Trainer, which saves and prints nothing, and logs only to a logger that it is given."""
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=len(batches),
        plugins=[plugin],
        callbacks=list(callbacks),
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(task, batches)


def spread(ours: list[float], stock: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios of two cases, round by round."""
    ratios = [a / b for a, b in zip(ours, stock, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "low": low, "high": high}


def written(ratio: dict[str, float]) -> str:
    """Return a ratio as median [lower quartile, upper quartile]."""
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def judged(ratio: dict[str, float], target: float | None) -> str:
    """Return a target and whether it is met, or nothing if there is none."""
    return f"{target:.2f} {'met' if ratio['median'] <= target else 'missed'}" if target else ""


def machine(device: str) -> dict:
    """Return what the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else None,
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "commit": os.environ.get("COMMIT") or _said_by("git", "describe", "--always", "--abbrev=40", "--dirty"),
    }


def _said_by(*command: str) -> str | None:
    """Return the first line that a program prints, or None where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None


def arguments(
    description: str, formats: Sequence[str], rounds: int, steps: int, models: Sequence[str] = ("tiny", "resnet18")
) -> argparse.ArgumentParser:
    """Return a command line with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="timed steps in a block")
    parser.add_argument("--warmup", type=int, default=10, help="steps before a block is timed")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the cases")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is disturbed least by other programs")
    parser.add_argument("--profile", metavar="KIND", help="print profiles of a kind of case and measure nothing else")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it runs: the numbers mean nothing"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Set the threads, and have Lightning say nothing."""
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def save(lines: list[dict], options: argparse.Namespace) -> None:
    """Write the lines, and what they depend on, if asked to: after each round, so that a run cut short leaves them."""
    if options.output is None:
        return
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.output.with_suffix(".part")
    content = {"machine": machine(options.device), "settings": settings, "results": lines}
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(options.output)


def report(lines: list[dict], table: str, options: argparse.Namespace) -> None:
    """Print the machine and a table of the lines, and write all that if asked to."""
    print(", ".join(f"{key} {value}" for key, value in machine(options.device).items() if value is not None))
    print(table)
    save(lines, options)
    if options.output is not None:
        print(f"written: {options.output}")
