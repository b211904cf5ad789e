"""Measure what fewer bits bring: a step in fp32, TF32, bf16, fp8 (scaled per tensor or per row) and int8.

    python examples/benchmarks/low_bits.py --device cuda --output examples/benchmarks/results/low_bits-cuda.json
    python examples/benchmarks/low_bits.py --device cpu --quick

    gpt        blocks of a GPT, 4096 wide on CUDA, which is where fp8 begins to pay: K and N of each product are at
               least 4096. In fp8 and int8 its blocks' linears are, embedding and head stay in bf16.
    resnet50   torchvision's. fp8 and int8 are for Linear layers, and it has one, its last: it is left in bf16.

Every block of steps is a real Trainer.fit with PerLayerPrecision. A round runs a block of each case, in an order
shuffled anew; a ratio is a mean step over the mean step in bf16 in the same round, and the table gives the median of
these ratios over the rounds with their quartiles: below 1 is faster than bf16. The null ratio is bf16 against itself.
TFLOP/s are the model's own matrix products, forward once and backward twice, over the median step. A case that this
machine or this version refuses is left out, and the table says why.
"""

import argparse
import contextlib
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from measuring import Inspector, Stopwatch, arguments, prepare, report, save, spread, train, written
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import Repeated

from lightning_mixprec import MixPrecError, PerLayerPrecision
from lightning_mixprec.evidence.instruments.flops import FlopCount

MODELS = ("gpt", "resnet50")
BLOCKS = {"layers": "model.blocks"}
POLICIES: dict[str, Any] = {
    "fp32": "fp32",
    "tf32": "fp32",
    "bf16": "bf16",
    "again": "bf16",
    "fp8": {"default": "bf16", "rules": [BLOCKS | {"compute": "fp8"}]},
    "fp8-row": {"default": "bf16", "rules": [BLOCKS | {"compute": "fp8", "scaling": "row"}]},
    "int8": {"default": "bf16", "rules": [BLOCKS | {"compute": "int8"}]},
}
BASE, BYTES = "bf16", 256


class Block(nn.Module):
    """A pre-norm transformer block of plain linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, tokens, width) for the same."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes to the logits of the next byte."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(BYTES, width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (batch, 256, tokens) for (batch, tokens)."""
        return self.head(self.norm(self.blocks(self.embedding(tokens)))).transpose(1, 2)


class Task(LightningModule):
    """A model, one batch that it sees at every step, and SGD with momentum, fused on CUDA."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.saved = contextlib.nullcontext
        self.last_loss = torch.tensor(float("nan"))
        with torch.device(options.device):
            if model == "gpt":
                self.model = GPT(options.width, options.depth, max(options.width // 128, 1))
                tokens = torch.randint(BYTES, (options.batch, options.context + 1))
                self.batch = (tokens[:, :-1], tokens[:, 1:])
            else:
                from torchvision.models import resnet50

                self.model = resnet50().to(memory_format=torch.channels_last)
                images = torch.randn(options.images, 3, options.side, options.side)
                labels = torch.randint(1000, (options.images,))
                self.batch = (images.to(memory_format=torch.channels_last), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        with self.saved():
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD: the cheapest optimizer hides the least."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, fused=self.device.type == "cuda" or None)


@dataclass
class Result:
    """What was measured of a case, or why nothing was.

    Attributes:
        seconds: of a step, by round.
        loss: of the fifth step.
    """

    seconds: list[float] = field(default_factory=list)
    memory_bytes: int = 0
    loss: float = float("nan")
    left_out: str | None = None


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    model: str
    format: str
    compiled: bool

    def refusal(self, options: argparse.Namespace) -> str | None:
        """Return why it is not measured, where that is known beforehand."""
        if self.format == "tf32" and options.device == "cpu":
            return "a CPU has no TF32"
        if self.model == "resnet50" and self.format.startswith(("fp8", "int8")):
            return "fp8 and int8 are for Linear layers, and a ResNet is made of convolutions"
        return None


@contextlib.contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    """Products and convolutions in TF32 or not, by the names of torch that all its versions know."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    torch.backends.cudnn.allow_tf32 = is_on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Bench:
    """The cases of one model in one mode, which train the same weights one after another.

    Attributes:
        results: by case.
        flops: of the matrix products of a step: those of forward, and twice as many in backward.
    """

    def __init__(self, model: str, compiled: bool, options: argparse.Namespace) -> None:
        self.options = options
        self.task = Task(model, options)
        self.initial = {name: tensor.clone() for name, tensor in self.task.state_dict().items()}
        with FlopCount(dict(self.task.named_modules())) as count, torch.no_grad():
            self.task.training_step(self.task.batch, 0)
        self.flops = 3 * sum(count.flops.values())
        if compiled:
            self.task.model.compile(backend=options.backend)
        cases = [Case(model, name, compiled) for name in options.formats]
        self.results = {case: Result(left_out=case.refusal(options)) for case in cases}

    def inspect(self) -> None:
        """Run a few steps of each case: it compiles, is refused or not, and shows its memory."""
        for case, result in self.results.items():
            if result.left_out is None:
                inspector = Inspector(step=3, device=self.options.device)
                try:
                    self.fit(case, 5, inspector)
                except MixPrecError as error:
                    result.left_out = str(error)
                result.memory_bytes, result.loss = inspector.memory_bytes, self.task.last_loss.item()

    def fit(self, case: Case, steps: int, observer: Any) -> None:
        """Train in a case's format, from the same weights as every other."""
        self.task.load_state_dict(self.initial)
        with tf32(case.format != "fp32"):
            plugin = PerLayerPrecision(POLICIES[case.format])
            train(self.task, plugin, Repeated(self.task.batch, steps), [observer], self.options.device)

    def time(self, case: Case) -> None:
        """Add the mean step of a block."""
        start, stop = self.options.warmup, self.options.warmup + self.options.steps
        stopwatch = Stopwatch([start, stop], self.options.device)
        self.fit(case, stop + 1, stopwatch)
        self.results[case].seconds += stopwatch.spans()[0]

    def rows(self) -> Iterator[dict]:
        """Yield what the table and the JSON say of each case."""
        timed = {case.format: result for case, result in self.results.items() if result.seconds}
        for case, result in self.results.items():
            row = asdict(case) | {"left_out": result.left_out}
            if case.format in timed:
                seconds = statistics.median(result.seconds)
                row |= {"step_ms": seconds * 1e3, "memory_bytes": result.memory_bytes, "loss": result.loss}
                row |= {"tflops_per_s": self.flops / seconds / 1e12}
                row |= {"ratio": spread(result.seconds, timed[BASE].seconds) if BASE in timed else None}
            yield row


def measure(benches: list[Bench], options: argparse.Namespace) -> None:
    """Time a block of each case in every round."""
    shuffler = random.Random(options.seed)
    for number in range(options.rounds):
        for bench in shuffler.sample(benches, len(benches)):
            cases = [case for case, result in bench.results.items() if result.left_out is None]
            for case in shuffler.sample(cases, len(cases)):
                bench.time(case)
        print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
        save([row for bench in benches for row in bench.rows()], options)
    print()


def table(lines: list[dict]) -> str:
    """Return the rows as text."""
    layout = "{:<27}{:>11}  {:<22}{:>9}{:>10}  {}"
    out = [layout.format("case", "step", "ratio to bf16", "TFLOP/s", "memory", "loss")]
    for line in lines:
        name = f"{line['model']} {'compiled ' * line['compiled']}{line['format']}"
        if line["left_out"] is not None:
            out.append(f"{name:<27}left out: {line['left_out']}")
        elif "step_ms" in line:
            ratio = written(line["ratio"]) if line["ratio"] else ""
            speed = f"{line['tflops_per_s']:.3g}"
            memory = f"{line['memory_bytes'] / 2**20:.1f} MiB"
            out.append(layout.format(name, f"{line['step_ms']:.2f} ms", ratio, speed, memory, f"{line['loss']:.4f}"))
    return "\n".join(out)


SIZES = {
    "cuda": {"width": 4096, "depth": 2, "context": 1024, "batch": 8, "images": 128, "side": 224},
    "cpu": {"width": 256, "depth": 2, "context": 64, "batch": 8, "images": 4, "side": 64},
    "quick": {"width": 32, "depth": 1, "context": 16, "batch": 2, "images": 2, "side": 32},
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, formats=[*POLICIES], rounds=10, steps=10, models=MODELS)
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    for name, size in SIZES["cuda"].items():
        parser.add_argument(f"--{name}", type=int, help=f"(default: {size} on CUDA, {SIZES['cpu'][name]} on a CPU)")
    options = parser.parse_args()
    for name, size in SIZES["quick" if options.quick else options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    if options.quick:
        options.rounds, options.steps, options.warmup = 2, 2, 2
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    prepare(options)
    benches = [Bench(model, mode == "compiled", options) for mode in options.modes for model in options.models]
    for bench in benches:
        bench.inspect()
        save([row for bench in benches for row in bench.rows()], options)
    measure(benches, options)
    lines = [row for bench in benches for row in bench.rows()]
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
