"""Measure what a step in an emulated 16-bit format takes beside fp32, and beside torch's own 16-bit kernels.

    python examples/benchmarks/emulation.py --output examples/benchmarks/results/emulation-cpu.json
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python examples/benchmarks/emulation.py \\
        --output examples/benchmarks/results/emulation-cpu-avx2.json

The environment of the second command has a newer CPU compute as one without AVX-512. A step is forward, backward and
SGD, by hand. A round takes one step of each case in turn, forwards and then backwards; a ratio is a case's shorter step
over that of fp32 in the same round, and the table gives the median of the rounds with the least and the largest, and
the median of the same in CPU time, which other programs disturb less. The target is 1.4 times fp32, compiled cases
against fp32 compiled alike. ``--native`` adds torch's own 16-bit kernels.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import arguments, prepare, report
from torch import Tensor, nn
from torch.nn import functional

from lightning_mixprec import PrecisionPolicy
from lightning_mixprec.engine.apply import attach

TARGET = 1.4
WORDS, CONTEXT, WIDTH, HEADS, BLOCKS = 512, 128, 256, 8, 4


class Block(nn.Module):
    """A block of a GPT: causal attention and a multilayer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.heads, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        split = self.heads(self.before(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Gpt(nn.Module):
    """A small GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Compute the logits of the next words."""
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def workload(model: str, quick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, inputs and labels."""
    torch.manual_seed(0)
    if model == "gpt":
        words = torch.randint(WORDS, (2 if quick else 8, CONTEXT))
        return Gpt(), words, words.roll(-1, 1).flatten()
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # for images of 32x32
    batch = 2 if quick else 64
    return net, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def stepper(model: str, case: str, compiler: str, quick: bool) -> Callable[[], tuple[float, float]]:
    """Return a function that takes a step and returns its seconds and CPU seconds.

    A case is fp32, or a format and who computes it.
    """
    net, inputs, labels = workload(model, quick)
    format, _, way = case.partition(" ")
    attachment = attach(net, PrecisionPolicy(format).resolve(net), "cpu", way == "emulated")
    run = net if compiler == "eager" else torch.compile(net, backend=compiler, fullgraph=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> tuple[float, float]:
        start, computed = time.perf_counter(), time.process_time()
        with attachment.context():
            loss = functional.cross_entropy(run(inputs).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, time.process_time() - computed

    return step


def spread(rounds: list[dict[str, float]], case: str) -> dict[str, float]:
    """Return the median, the least and the largest of a case's ratio to fp32."""
    ratios = [taken[case] / taken["fp32"] for taken in rounds]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def measure(model: str, compiler: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a line for each case of a model."""
    ways = ["emulated", "native"] if options.native and compiler == "eager" else ["emulated"]
    cases = ["fp32", *(f"{format} {way}" for format in options.formats for way in ways)]
    steps = {case: stepper(model, case, compiler, options.quick) for case in cases}
    for step in steps.values():
        for _ in range(1 if options.quick else options.warmup):
            step()
    wall, cpu = [], []
    for _ in range(options.rounds):
        there = {case: step() for case, step in steps.items()}
        back = {case: steps[case]() for case in reversed(cases)}
        wall.append({case: min(there[case][0], back[case][0]) for case in cases})
        cpu.append({case: min(there[case][1], back[case][1]) for case in cases})
    return [
        {
            "model": model,
            "compiler": compiler,
            "case": case,
            "seconds": statistics.median(taken[case] for taken in wall),
            "ratio": spread(wall, case),
            "cpu_time_ratio": spread(cpu, case),
        }
        for case in cases
    ]


def table(lines: list[dict[str, Any]]) -> str:
    """Return the lines as a table."""
    rows = [f"{'model':10}{'compiler':11}{'case':15}{'s/step':>8}  CPU time  ratio (least to largest)"]
    for line in lines:
        ratio = line["ratio"]
        missed = "" if "emulated" not in line["case"] or ratio["median"] <= TARGET else f"  more than {TARGET}"
        written = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"
        rows.append(
            f"{line['model']:10}{line['compiler']:11}{line['case']:15}{line['seconds']:8.3f}"
            f"{line['cpu_time_ratio']['median']:10.2f}  {written}{missed}"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments(__doc__ or "", ["bf16", "fp16"], rounds=5, steps=1, models=("resnet18", "gpt"))
    parser.add_argument("--compilers", nargs="+", default=["eager", "aot_eager", "inductor"])
    parser.add_argument("--native", action="store_true", help="also torch's own 16-bit kernels, without AVX-512 slow")
    parser.set_defaults(device="cpu", warmup=2)
    options = parser.parse_args()
    options.instructions = os.environ.get("ONEDNN_MAX_CPU_ISA", "all"), torch.backends.cpu.get_cpu_capability()
    prepare(options)
    lines: list[dict[str, Any]] = []
    for model in options.models:
        for compiler in options.compilers:
            lines += measure(model, compiler, options)
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
