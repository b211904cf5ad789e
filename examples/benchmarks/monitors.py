"""Measure what the monitors cost: OverflowMonitor, UnderflowMonitor and FidelityMonitor at their default arguments.

    python examples/benchmarks/monitors.py --device cpu --output examples/benchmarks/results/monitors-cpu.json
    python examples/benchmarks/monitors.py --device cuda --output examples/benchmarks/results/monitors-cuda.json

Every block of steps is a real Trainer.fit with a CSVLogger. A round runs a block of each kind, in an order shuffled
anew; a ratio is a mean step over the mean step without callbacks in the same round, and the table gives the median of
these ratios over the rounds with their quartiles. The null ratio is the run without callbacks against itself.

    none        no callbacks: the step that all others are compared with
    empty       three callbacks without a hook: what Lightning itself takes for three callbacks
    report      PrecisionReport, steps that are not sampled
    idle        the three monitors, steps that are not sampled
    defaults    the three monitors, mean step of a period of P = 1000 steps, of which the monitors sample one
    statistics  a histogram of the weight gradients of each layer, at every step
    sampled     one sampled step of the three monitors, in ordinary steps; underflow, fidelity: of these alone
    diagnosis   one step that overflows, with OverflowMonitor, in ordinary steps

A block of a monitor begins with the event, a sampled or overflowing step. What it leaves to the next step (on CUDA
most of a diagnosis) belongs to it: with E the time of these two steps and I the mean of the others, which are idle, the
event takes E - I, and the mean step of a period is (E + (P - 2) I) / P. Where a block has 1000 steps, as by default
with the tiny model, that is its mean.

No values overflow bf16 that do not overflow fp32, so a diagnosis is that of a batch with an infinity; in fp16 one with
large values overflows. Both take two traced replays. Stock bf16 has no guard, so nothing is diagnosed there: after such
a step its weights are lost. Host reads on CUDA are the warnings of torch.cuda.set_sync_debug_mode, which does not see
that OverflowMonitor waits for the flag of the step before while the device works on this one.
"""

import argparse
import os
import random
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from measuring import Inspector, Profiler, Stopwatch, arguments, judged, prepare, report, save, spread, train, written
from torch import Tensor
from workloads import Case, Repeated, Task

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PrecisionReport, UnderflowMonitor
from lightning_mixprec.numerics.exponents import histograms

PERIOD = UnderflowMonitor().every_n_steps
DEFAULTS_TARGET, STATISTICS_TARGET = 1.02, 1.15  # at most 1.01, within noise
PLAIN, EVENTS = ("none", "again", "empty", "report", "statistics"), ("sampled", "underflow", "fidelity", "diagnosis")
KINDS = ("none", "again", "empty", "report", "idle", "defaults", "statistics", *EVENTS)


@dataclass(frozen=True)
class Setting:
    """What is trained: a model in a format, by PerLayerPrecision or as Lightning's own plugin does it."""

    model: str
    format: str
    compiled: bool

    @property
    def case(self) -> Case:
        """Return the case that has the model and the plugin."""
        name, _, is_stock = self.format.partition("-")
        return Case(self.model, False, name, "stock" if is_stock else "uniform")

    def blocks(self) -> list[str]:
        """Return the kinds of blocks, the alternatives of which matter to an eager model alone."""
        events = ["underflow", "fidelity"] + ([] if self.case.kind == "stock" else ["diagnosis"])
        return ["none", "again", "sampled", "statistics", "report", *([] if self.compiled else ["empty", *events])]

    def targets(self) -> dict[str, float]:
        """Return the largest ratios aimed at, by kind."""
        return {"defaults": DEFAULTS_TARGET, "report": DEFAULTS_TARGET} | (
            {"statistics": STATISTICS_TARGET} if self.model == "resnet18" else {}
        )


class Statistics(Callback):
    """Histograms of the weight gradients of each layer at every step, of as many elements as the monitors look at."""

    max_elements = UnderflowMonitor().max_elements

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the weights."""
        own = [list(layer.parameters(recurse=False)) for layer in module.modules()]
        self.layers = [parameters for parameters in own if parameters]

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count."""
        self.latest = histograms([[p.grad for p in layer] for layer in self.layers], self.max_elements)


def callbacks(kind: str, due: int) -> list[Callback]:
    """Return the callbacks of a kind, those that sample primed to do so at one batch and not again soon."""
    made: dict[str, list[type[Callback]]] = {
        "empty": [Callback] * 3,
        "report": [PrecisionReport],
        "statistics": [Statistics],
        "underflow": [UnderflowMonitor],
        "fidelity": [FidelityMonitor],
        "diagnosis": [OverflowMonitor],
        "sampled": [OverflowMonitor, UnderflowMonitor, FidelityMonitor],
    }
    monitors = [each() for each in made.get(kind, [])]
    return [*monitors, Primer(monitors, due)] if kind in ("report", "underflow", "fidelity", "sampled") else monitors


class Primer(Callback):
    """Has monitors sample at one batch and not again soon; once the run has begun, with which they begin anew."""

    def __init__(self, monitors: list[Callback], due: int) -> None:
        self.monitors, self.due = monitors, due

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Set what they have seen."""
        for monitor in self.monitors:
            if isinstance(monitor, (UnderflowMonitor, FidelityMonitor)):
                monitor.load_state_dict(monitor.state_dict() | {"batches_seen": monitor.every_n_steps - self.due})
            elif isinstance(monitor, PrecisionReport):
                monitor.load_state_dict(monitor.state_dict() | {"batches_seen": 1})  # its sample lies behind it


def check(kind: str, monitors: list[Callback], due: int) -> None:
    """Raise unless each monitor did what its time is taken for: an event that fails is cheap."""
    for monitor in monitors:
        if isinstance(monitor, UnderflowMonitor):
            assert monitor.latest, "UnderflowMonitor sampled nothing"
        elif isinstance(monitor, FidelityMonitor):
            assert monitor.latest["layers"], "FidelityMonitor sampled nothing"
        elif isinstance(monitor, OverflowMonitor):
            diagnosed = [event["batch_idx"] for event in monitor.events if event["batch_idx"] >= due]
            assert diagnosed == ([due] if kind == "diagnosis" else []), f"diagnosed batches: {diagnosed}"


def overflowing(batch: tuple[Tensor, Tensor], format: str) -> tuple[Tensor, Tensor]:
    """Return the batch with inputs that fp16 cannot hold, or, for another format, with an infinity."""
    inputs = batch[0].clone()
    if format == "fp16":
        inputs *= 1e6
    else:
        inputs[(0,) * inputs.dim()] = float("inf")
    return inputs, batch[1]


def derived(kind: str, spans: list[float]) -> dict[str, float]:
    """Return the seconds of each kind that a block tells of, from the mean steps between the readings of a clock."""
    if kind in PLAIN:
        return {kind: spans[0]}
    event, idle = spans
    times = {kind: 2 * event - idle}
    if kind == "sampled":
        times |= {"idle": idle, "defaults": (2 * event + (PERIOD - 2) * idle) / PERIOD}
    return times


class Bench:
    """A setting's model, compiled once, and the blocks that train it, each from the same weights.

    Attributes:
        wall: seconds by kind, of each round.
        cpu: CPU seconds by kind, of each round.
        host_reads: of an idle step, by kind.
    """

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        self.setting, self.options = setting, options
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.host_reads: dict[str, int] = {}
        self.task = Task(setting.case, options.quick, options.device)
        self.initial = {name: tensor.clone() for name, tensor in self.task.state_dict().items()}
        if setting.compiled:
            self.task.model.compile(backend=options.backend)
        slow = {("resnet18", "cpu"): 40, ("resnet18", "cuda"): 4}.get((setting.model, options.device), 1)
        self.warmup = max(2, options.warmup // min(slow, 4))
        self.steps = max(6, options.steps // slow)

    def fit(self, kind: str, observer: Callback, steps: int, due: int) -> None:
        """Train with the callbacks of a kind, whose event, if it has one, is due at a step."""
        self.task.load_state_dict(self.initial)
        instead = {due: overflowing(self.task.batch, self.setting.case.format)} if kind == "diagnosis" else {}
        batches = Repeated(self.task.batch, steps, instead)
        monitors = callbacks(kind, due)
        plugin = self.setting.case.plugin(self.options.device)
        with tempfile.TemporaryDirectory() as folder:
            train(self.task, plugin, batches, [observer, *monitors], self.options.device, CSVLogger(folder))
        if due < steps:
            check(kind, monitors, due)

    def time(self, kind: str) -> None:
        """Add what a block of this kind tells."""
        is_long = kind in PLAIN or kind == "sampled"
        stop = self.warmup + (self.steps if is_long else max(6, self.steps // 10))
        readings = [self.warmup, *([self.warmup + 2] if kind in EVENTS else []), stop]
        stopwatch = Stopwatch(readings, self.options.device)
        self.fit(kind, stopwatch, stop + 1, due=self.warmup)
        for times, spans in zip((self.wall, self.cpu), stopwatch.spans(), strict=True):
            for name, seconds in derived(kind, spans).items():
                times[name].append(seconds)

    def inspect(self) -> None:
        """Count host reads; on a CPU the counter cannot see into a compiled model."""
        if self.options.device == "cuda" or not self.setting.compiled:
            for kind, name in (("none", "none"), ("sampled", "idle")):
                inspector = Inspector(step=4, device=self.options.device)
                self.fit(kind, inspector, 6, due=100)
                self.host_reads[name] = inspector.host_reads

    def profile(self, kind: str) -> None:
        """Print where the Python time of a kind goes: of an event's two steps, or of idle steps."""
        is_event = kind in EVENTS
        stop = self.warmup + (2 if is_event else min(self.steps, PERIOD // 2))
        profiler = Profiler(self.warmup, stop)
        due = self.warmup if is_event else 0
        self.fit("sampled" if kind == "idle" else kind, profiler, stop + 1, due)
        profiler.print(f"{self.setting} {kind}", *(("cumtime", 60) if is_event else ()))

    def rows(self) -> Iterator[dict]:
        """Yield what the table and the JSON say of each kind."""
        null = spread(self.wall["again"], self.wall["none"])
        for kind in (kind for kind in KINDS if kind in self.wall):
            reads = self.host_reads.get(kind)
            yield asdict(self.setting) | {
                "kind": kind,
                "milliseconds": statistics.median(self.wall[kind]) * 1e3,
                "ratio": spread(self.wall[kind], self.wall["none"]),
                "cpu_time_ratio": spread(self.cpu[kind], self.cpu["none"]),
                "null_ratio": null,
                "target": self.setting.targets().get(kind),
                "host_reads_per_step": reads,
                "added_host_reads": None if reads is None else reads - self.host_reads["none"],
            }


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield what is trained: Lightning's own plugin runs eagerly alone, and in fp16 on a CPU the tiny model alone."""
    for model in options.models:
        for mode in options.modes:
            for name in options.formats:
                is_slow = name == "fp16" and options.device == "cpu" and (model == "resnet18" or mode == "compiled")
                if not is_slow and not (mode == "compiled" and "-" in name):
                    yield Setting(model, name, mode == "compiled")


def measure(benches: list[Bench], options: argparse.Namespace) -> None:
    """Count the reads of every setting once, then time a block of each of its kinds in every round."""
    for bench in benches:
        bench.inspect()
        for kind in bench.setting.blocks() if bench.setting.compiled else ():
            bench.fit(kind, Callback(), bench.warmup, due=1)  # compiles
    shuffler = random.Random(options.seed)
    for number in range(options.rounds):
        for bench in shuffler.sample(benches, len(benches)):
            blocks = bench.setting.blocks()
            for kind in shuffler.sample(blocks, len(blocks)):
                bench.time(kind)
        print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
        save([row for bench in benches for row in bench.rows()], options)
    print()


def table(lines: list[dict]) -> str:
    """Return the rows as text."""
    head = ("case", "time", "ratio", "null ratio", "target", "CPU time", "reads")
    layout = "{:<38}{:>11}  {:<24}{:<21}{:<13}{:>8}{:>10}"
    out = [layout.format(*head)]
    for line in lines:
        name = f"{line['model']} {'compiled ' * line['compiled']}{line['format']} {line['kind']}"
        is_base, added = line["kind"] == "none", line["added_host_reads"]
        out.append(
            layout.format(
                name,
                f"{line['milliseconds']:.2f} ms",
                "" if is_base else written(line["ratio"]),
                written(line["null_ratio"]) if line["kind"] in ("again", "defaults", "statistics") else "",
                judged(line["ratio"], line["target"]),
                "" if is_base else f"{line['cpu_time_ratio']['median']:.3f}",
                "" if added is None else f"{line['host_reads_per_step']}" if is_base else f"+{added}",
            ).rstrip()
        )
    return "\n".join(out)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, formats=["fp32", "bf16", "fp16", "bf16-mixed"], rounds=12, steps=PERIOD)
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--backend", help="of torch.compile (default: inductor; aot_eager without a C++ compiler)")
    options = parser.parse_args()
    if options.profile not in (None, *KINDS):
        parser.error(f"--profile takes one of {', '.join(KINDS)}")
    has_compiler = options.device == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    options.backend = options.backend or ("inductor" if has_compiler else "aot_eager")
    if options.quick:
        options.rounds, options.steps, options.warmup = 2, 6, 2
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    prepare(options)
    benches = [Bench(setting, options) for setting in settings(options)]
    if options.profile:
        for bench in benches:
            bench.profile(options.profile)
        return
    measure(benches, options)
    lines = [row for bench in benches for row in bench.rows()]
    if "compiled" in options.modes:
        print(f"compiled by torch.compile(backend={options.backend!r})")
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
