"""Measure how costs grow with the number of layers: of setting up, of a step, of a sample, and of what is written.

    python examples/benchmarks/layers.py --output examples/benchmarks/results/layers-cpu.json

The model is a chain of tiny residual layers, every second of which computes in fp32 and the others in bf16. Times are
CPU seconds of this machine; calls and bytes are counted, and the same everywhere. The last column says by which
factor a number grew over the last step of the table, as a share of the factor by which the layers grew: 1 is linear.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from workloads import Repeated

import lightning_mixprec
from lightning_mixprec import FidelityMonitor, OverflowMonitor, PerLayerPrecision, PrecisionReport, UnderflowMonitor
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.policy.policy import PrecisionPolicy

HOME = str(Path(lightning_mixprec.__file__).parent)
SAMPLE_EVERY, STEPS = 5, 10  # the first and the sixth batch are sampled


class Wide(nn.Linear):
    """A layer that the policy has compute in fp32."""


class Chain(LightningModule):
    """Residual layers of four features."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList((Wide if place % 2 else nn.Linear)(4, 4) for place in range(layers))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        x = batch
        for layer in self.layers:
            x = x + 1e-3 * layer(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the cheapest optimizer."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def policy() -> PrecisionPolicy:
    """Every second layer in fp32, by its class."""
    return PrecisionPolicy.from_dict({"default": "bf16", "rules": [{"types": "Wide", "compute": "fp32"}]})


def listed(layers: int) -> PrecisionPolicy:
    """The same with a rule for each layer, as a controller writes it."""
    rules = [{"layers": [f"layers.{place}"], "compute": "fp32"} for place in range(1, layers, 2)]
    return PrecisionPolicy.from_dict({"default": "bf16", "rules": rules})


class Steps(Callback):
    """Takes the time of each step, and counts calls of the package's functions in one that is not sampled."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.calls = 0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock, and begin or end to count."""
        sys.setprofile(self._see if batch_idx == STEPS - 2 else None)
        self.times.append(time.process_time())

    def _see(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event == "call" and frame.f_code.co_filename.startswith(HOME)

    @property
    def ordinary(self) -> float:
        """CPU seconds of a step that is not sampled, nor counted."""
        spans = self.spans
        return statistics.median(spans[1:SAMPLE_EVERY] + spans[SAMPLE_EVERY + 1 : STEPS - 2])

    @property
    def spans(self) -> list[float]:
        """CPU seconds of each step but the last."""
        return [later - now for now, later in zip(self.times, self.times[1:], strict=False)]


def trained(layers: int, folder: Path, monitors: list[Callback]) -> tuple[Trainer, Steps]:
    """Train for some steps."""
    steps = Steps()
    trainer = Trainer(
        plugins=PerLayerPrecision(policy(), emulate=False), callbacks=[steps, *monitors], max_steps=STEPS,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Chain(layers), Repeated(torch.ones(2, 4), STEPS))
    sys.setprofile(None)
    return trainer, steps


def seconds(function: Callable[[], object]) -> float:
    """The better of two."""
    times = []
    for _ in range(2):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return min(times)


def attached_and_detached(layers: int) -> Callable[[], object]:
    """Attach a policy to a new model; what that takes is timed."""
    model = Chain(layers)
    assignment = policy().resolve(model)

    def run() -> None:
        attach(model, assignment, "cpu", emulate=False).detach()

    return run


def measured(layers: int) -> dict[str, float]:
    """What a model with so many layers costs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, plain = trained(layers, folder, [])
        monitors: list[Any] = [kind(SAMPLE_EVERY) for kind in (UnderflowMonitor, FidelityMonitor, PrecisionReport)]
        trainer, watched = trained(layers, folder, [OverflowMonitor(), *monitors])
        rows = [(len(line) + 1, json.loads(line)) for line in (folder / "mixprec.jsonl").read_text().splitlines()]
        of_second = [
            size for size, row in rows if row["step"] in (SAMPLE_EVERY, SAMPLE_EVERY + 1) and "curve" not in row
        ]
        states = {type(each).__name__: each.state_dict() for each in (*monitors, trainer.precision_plugin)}
        torch.save(states, folder / "states.pt")
        return {
            "resolve_ms": 1e3 * seconds(lambda: policy().resolve(Chain(layers))),
            "resolve_a_rule_per_layer_ms": 1e3 * seconds(lambda: listed(layers).resolve(Chain(layers))),
            "attach_and_detach_ms": 1e3 * seconds(attached_and_detached(layers)),
            "step_ms": 1e3 * plain.ordinary,
            "step_watched_ms": 1e3 * watched.ordinary,
            "sample_ms": 1e3 * (watched.spans[SAMPLE_EVERY] - watched.ordinary),
            "calls_step": plain.calls,
            "calls_step_watched": watched.calls,
            "journal_bytes_per_sample": sum(of_second),
            "report_bytes": (folder / "precision_report.html").stat().st_size,
            "state_bytes": (folder / "states.pt").stat().st_size,
        }


def table(results: dict[int, dict[str, float]]) -> str:
    """Return the results as text."""
    counts = list(results)
    lines = [f"{'':<30}" + "".join(f"{count:>14,}" for count in counts) + f"{'growth':>10}"]
    for key in results[counts[0]]:
        values = [results[count][key] for count in counts]
        grown = ""
        if len(counts) > 1 and values[-2] > 0:
            grown = f"{values[-1] / values[-2] / (counts[-1] / counts[-2]):.2f}"
        cells = "".join(f"{value:>14,.1f}" if key.endswith("_ms") else f"{value:>14,.0f}" for value in values)
        lines.append(f"{key:<30}{cells}{grown:>10}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 1000, 10000], help="numbers of layers")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = {}
    for count in options.layers:
        results[count] = measured(count)
        print(f"{count} layers: {results[count]}", flush=True)
    print(table(results))
    if options.output is not None:
        options.output.write_text(json.dumps({"torch": torch.__version__, "layers": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
