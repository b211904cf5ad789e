"""Measure what AdamW takes and learns with weights and moments in fewer bits: bytes, time and the final loss.

    python examples/benchmarks/optimizers.py --device cpu --output examples/benchmarks/results/optimizers-cpu.json

A case is what keeps the bits of weights stored in bf16 (or fp32: all is stored in fp32) and what moments are stored in.
The loop is by hand, without the plugin: blocks and convolutions are stored in bf16 and widened to fp32 where they are
used, all arithmetic is in fp32, and norms, embeddings and the last layer are stored in fp32.

bytes: of weight, gradient and state of a parameter stored in 16 bits, counted in the tensors that exist after a step,
beside the table of the guide. time: a step of the optimizer alone, in turns with torch.optim.AdamW on fp32 weights,
foreach and fused; ratios round by round (of the seconds that the processor computed, which other programs disturb less;
on CUDA of wall time), and ``again`` is foreach once more. loss: the mean of the last tenth of the steps; of ``--seeds``
runs their mean, least and largest; batches of a seed are the same in all cases. ``--parts`` chooses.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from measuring import arguments, prepare, report, save, spread, written
from torch import Tensor, nn
from torch.nn import functional

from lightning_mixprec.optim import AdamW

KEPT = {"exact": 2, "kahan": 2, "stochastic": 0, "nearest": 0}  # bytes beside a weight in bf16
MOMENTS = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 256}  # bytes of one; int8 has a scale for each 256
CASES = [f"{weights} {states}" for weights in ("fp32", *KEPT) for states in MOMENTS]
STOCK = ["foreach", "again", "fused"]
WORDS, CONTEXT, RATE = 64, 32, 1e-3


class Block(nn.Module):
    """A block of a GPT; its norms are in fp32."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block of (batch, tokens, width)."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Gpt(nn.Module):
    """A small GPT: (batch, tokens) to logits (batch, words, tokens)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Compute the logits of the next words."""
        x = self.words(words) + self.places.weight[: words.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


class Shortcut(nn.Module):
    """Two convolutions with norms on a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [[nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)] for _ in range(2)]
        self.body = nn.Sequential(*layers[0], nn.ReLU(), *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block of (batch, width, height, width)."""
        return torch.relu(x + self.body(x))


class ResNet(nn.Module):
    """A small ResNet: (batch, 3, 8, 8) to logits of 10 classes."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Shortcut(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def network(model: str, seed: int, options: argparse.Namespace) -> nn.Module:
    """Return a model, drawn in fp32."""
    torch.manual_seed(seed)
    width, depth = (64, 2) if options.device == "cpu" else (256, 4)
    return (Gpt if model == "gpt" else ResNet)(width, depth).to(options.device)


def narrow_weights(net: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are to be stored in 16 bits: the matrices of the blocks."""
    return {name: p for name, p in net.named_parameters() if name.startswith("blocks.") and p.ndim > 1}


class Trained:
    """A model in the storage of a case, and its AdamW; a case of ``STOCK`` is torch's on fp32 weights."""

    def __init__(self, model: str, case: str, seed: int, options: argparse.Namespace) -> None:
        self.net = network(model, seed, options)
        weights, _, states = case.partition(" ")
        narrow = narrow_weights(self.net)
        wide = {name: p.detach().clone() for name, p in narrow.items()}
        if weights in KEPT:
            for p in narrow.values():
                p.data = p.data.bfloat16()
        self.params = list(narrow.values())
        if case in STOCK:
            chosen = {"fused": True} if case == "fused" else {"foreach": True}
            self.optimizer: Any = torch.optim.AdamW(self.net.parameters(), RATE, **chosen)
            return
        kept = weights if weights in KEPT else "exact"  # fp32 weights have nothing to keep
        self.optimizer = AdamW(self.net.parameters(), RATE, weights=kept, states=states, foreach=True, seed=seed)
        if weights in KEPT:
            for name, p in narrow.items():
                self.optimizer.set_weight(p, wide[name])

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, computed in fp32 whatever is stored."""
        wide = {name: p.float() for name, p in self.net.named_parameters()}
        return functional.cross_entropy(torch.func.functional_call(self.net, wide, (inputs,)), labels)

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Train on a batch; gradients stay until the next."""
        self.optimizer.zero_grad()
        loss = self.loss(inputs, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def batches(model: str, seed: int, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches that can be learned in part: words that follow on a word by a table, or noisy pictures."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(WORDS, (WORDS, 4), generator=generator)
    pictures = torch.randn(10, 3, 8, 8, generator=generator)
    while True:
        if model == "gpt":
            words = torch.randint(WORDS, (16, CONTEXT + 1), generator=generator)
            choices = torch.randint(4, words.shape, generator=generator)
            for place in range(CONTEXT):
                words[:, place + 1] = table[words[:, place], choices[:, place]]
            inputs, labels = words[:, :-1], words[:, 1:]
        else:
            labels = torch.randint(10, (32,), generator=generator)
            inputs = pictures[labels] + 3 * torch.randn(32, 3, 8, 8, generator=generator)
        yield inputs.to(options.device), labels.to(options.device)


def bytes_each(model: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the bytes of a parameter stored in 16 bits, counted and by the table."""
    trained = Trained(model, case, 0, options)
    trained.step(*next(batches(model, 0, options)))
    tensors = [
        each
        for p in trained.params
        for each in (p, p.grad, *(kept for name, kept in trained.optimizer.state[p].items() if name != "step"))
        if isinstance(each, Tensor)
    ]
    counted = sum(each.numel() * each.element_size() for each in tensors) / sum(p.numel() for p in trained.params)
    weights, states = case.split()
    documented = (4 + KEPT[weights] if weights in KEPT else 8) + 2 * MOMENTS[states]
    return {"part": "bytes", "model": model, "case": case, "counted": counted, "documented": documented}


def times(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the time of a step of each case as ratios to torch's."""
    names = [*STOCK, *options.formats]
    cases = {name: Trained(model, name, 0, options) for name in names}
    batch = next(batches(model, 0, options))
    for trained in cases.values():
        trained.step(*batch)
    taken: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(options.seed)
    for _ in range(options.rounds):
        for name in order.sample(names, len(names)):
            taken[name].append(min(_seconds(cases[name].optimizer, options) for _ in range(options.steps)))
    return [
        {
            "part": "time",
            "model": model,
            "case": name,
            "seconds": statistics.median(taken[name]),
            **{f"to_{stock}": spread(taken[name], taken[stock]) for stock in ("foreach", "fused")},
        }
        for name in names
    ]


def _seconds(optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> float:
    if options.device == "cpu":
        start = time.process_time()
        optimizer.step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def final_losses(model: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the final loss of each seed."""
    finals = []
    for seed in range(options.seeds):
        trained = Trained(model, case, seed, options)
        stream = batches(model, seed, options)
        losses = [trained.step(*next(stream)) for _ in range(options.length)]
        finals.append(torch.stack(losses[-max(1, options.length // 10) :]).mean().item())
    return {"part": "loss", "model": model, "case": case, "losses": finals, "mean": statistics.mean(finals)}


def table(lines: list[dict[str, Any]]) -> str:
    """Return the lines as a table."""
    rows = [f"{'part':6}{'model':8}{'case':17}"]
    for line in lines:
        if line["part"] == "bytes":
            told = f"{line['counted']:.2f} bytes, {line['documented']:.2f} by the table"
        elif line["part"] == "time":
            told = f"{line['seconds'] * 1e3:.2f} ms, to foreach {written(line['to_foreach'])}"
            told += f", to fused {written(line['to_fused'])}"
        else:
            told = f"{line['mean']:.4f} ({min(line['losses']):.4f} to {max(line['losses']):.4f})"
        rows.append(f"{line['part']:6}{line['model']:8}{line['case']:17}{told}")
    return "\n".join(rows)


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments(__doc__ or "", CASES, rounds=7, steps=3, models=("gpt", "resnet"))
    parser.add_argument("--parts", nargs="+", choices=["bytes", "time", "loss"], default=["bytes", "time", "loss"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case")
    parser.add_argument("--length", type=int, default=60, help="steps of a run that ends in a loss")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.seeds, options.length = 2, 1, 1, 2
    prepare(options)
    lines: list[dict[str, Any]] = []
    for model in options.models:
        if "bytes" in options.parts:
            lines += [bytes_each(model, case, options) for case in options.formats]
        if "time" in options.parts:
            lines += times(model, options)
        for case in options.formats if "loss" in options.parts else ():
            lines.append(final_losses(model, case, options))
            save(lines, options)
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
