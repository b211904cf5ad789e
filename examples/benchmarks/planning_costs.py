"""What costs predict of mixed policies, beside what is measured: saved bytes, the peak of memory, the time of a step.

    python examples/benchmarks/planning_costs.py --output examples/benchmarks/results/planning_costs-cpu.json

For four models (a CNN, a GPT, a recurrent net, a recommender) each layer and format is measured alone. For policies
that mix formats at random, the bytes that a step saves and the most that is alive at once are then predicted and
measured (torch's hooks, a count of live memory). Of six policies that people use the time of a step is predicted and
measured, in turns; of each pair whose measured times differ by more than their noise (quartiles that do not meet), the
order is compared. `--quick` runs in seconds, and its times mean nothing.
"""

import itertools
import random
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch
from measuring import arguments, prepare, report
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mixprec import PrecisionPolicy, Rule
from lightning_mixprec.deploy.used_memory import LiveBytes, SavedBytes
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.evidence.measuring.costs import measure_costs
from lightning_mixprec.planning.cost import Costs
from lightning_mixprec.policy.patterns import literal
from lightning_mixprec.policy.rule_folding import folded_policy


class Cnn(pl.LightningModule):
    """Convolutions with the norms and activations that networks have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))
        self.batch = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Classify images."""
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Gpt(pl.LightningModule):
    """A decoder of text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.batch = torch.randint(256, (8, 65))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Predict the next words."""
        length = batch.shape[1] - 1
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.blocks(self.words(batch[:, :-1]), mask=mask, is_causal=True)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), batch[:, 1:].flatten())


class Recurrent(pl.LightningModule):
    """An LSTM over words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(256, width), nn.LSTM(width, width, 2, batch_first=True)
        self.norm, self.hidden, self.head = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, 5)
        self.batch = torch.randint(256, (16, 24)), torch.randint(5, (16,))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Classify texts."""
        hidden, _ = self.lstm(self.words(batch[0]))
        return F.cross_entropy(self.head(self.hidden(self.norm(hidden[:, -1])).relu()), batch[1])


class Recommender(pl.LightningModule):
    """Embeddings of users and items, their products, and a perceptron on top."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(2000, width), nn.EmbeddingBag(4000, width)
        self.bottom = nn.Sequential(nn.Linear(13, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 3, 8 * width), nn.ReLU(), nn.Linear(8 * width, 4 * width))
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(4 * width, 1))
        ids = torch.randint(2000, (256,)), torch.randint(4000, (256, 4))
        self.batch = (*ids, torch.randn(256, 13)), torch.rand(256).round()

    def training_step(self, batch: tuple[tuple[Tensor, ...], Tensor], batch_idx: int) -> Tensor:
        """Predict clicks."""
        (user, items, numbers), clicked = batch
        dense = self.bottom(numbers)
        parts = torch.stack([self.users(user), self.items(items), dense], 1)
        products = torch.bmm(parts, parts.transpose(1, 2))[:, [0, 0, 1], [1, 2, 2]]
        return F.binary_cross_entropy_with_logits(self.last(self.top(torch.cat([products, dense], 1)))[:, 0], clicked)


MODELS = {"cnn": (Cnn, 64), "gpt": (Gpt, 128), "recurrent": (Recurrent, 128), "recommender": (Recommender, 64)}


def at_random(costs: Costs, formats: list[str], chance: random.Random) -> dict[str, str]:
    """A format for each layer: fp32, or for a share of the layers one of some others."""
    share = chance.choice([0.3, 0.5, 0.8, 1.0])
    found = {}
    for name, by_format in costs.layers.items():
        usable = [each for each in formats if each in by_format]
        found[name] = chance.choice(usable) if usable and chance.random() < share else "fp32"
    return found


def policy_of(formats: dict[str, str], module: nn.Module) -> PrecisionPolicy:
    """The policy that gives each layer's own operations a format."""
    rules = []
    for name, format in formats.items():
        has_inside = not name or any(True for _ in module.get_submodule(name).children())
        narrower = {"recurse": False} if has_inside else {}
        if format != "fp32":
            rules.append(Rule(literal(name) if name else "", compute=format, **narrower))
    return PrecisionPolicy("fp32", rules)


def memory(module: pl.LightningModule, policy: PrecisionPolicy) -> tuple[int, int]:
    """The bytes that a step saves for its backward, and the most that is alive at once beside what was there."""
    attachment = attach(module, policy.resolve(module), "cpu")
    saved = SavedBytes([*module.parameters(), *module.buffers()])
    with LiveBytes() as live:
        with saved.counting(), attachment.context():
            loss = module.training_step(module.batch, 0)
        loss.backward()
    attachment.detach()
    module.zero_grad()
    return saved.bytes, live.peak


def errors_of_memory(module: pl.LightningModule, costs: Costs, options: object) -> dict:
    """The largest relative errors of predicted bytes over policies at random."""
    chance, found = random.Random(options.seed), []
    resident = costs.fixed_bytes + 3 * sum(param.nbytes for param in module.parameters())
    for _ in range(options.policies):
        formats = at_random(costs, ["bf16"], chance)
        saved, peak = memory(module, policy_of(formats, module))
        predicted = costs.of_step(formats).memory_bytes - resident
        found.append((abs(costs.saved_bytes(formats) / saved - 1), abs(predicted / peak - 1)))
    return {"saved_error": max(each for each, _ in found), "peak_error": max(each for _, each in found)}


def six(costs: Costs, module: nn.Module) -> dict[str, dict[str, str]]:
    """Six policies, as formats of layers."""
    products = [name for name, by_format in costs.layers.items() if by_format["fp32"].flops]
    in_order = [name for name, _ in module.named_modules() if name in products] or products
    wide = {"fp32": set(costs.layers), "bf16": set()}
    wide["ends wide"] = {"", in_order[0], in_order[-1]}
    wide["norms wide"] = {name for name in costs.layers if "Norm" in type(module.get_submodule(name)).__name__}
    wide["first half"] = set(in_order[len(in_order) // 2 :]) | {""}
    wide["products alone"] = set(costs.layers) - set(products)
    return {name: {layer: "fp32" if layer in kept else "bf16" for layer in costs.layers} for name, kept in wide.items()}


def times(module: pl.LightningModule, policies: list[PrecisionPolicy], options: object) -> list[list[float]]:
    """The CPU seconds of forward and backward under each policy, in turns, round by round."""
    found: list[list[float]] = [[] for _ in policies]
    order = random.Random(options.seed)
    for _ in range(options.rounds):
        for place in order.sample(range(len(policies)), len(policies)):
            attachment = attach(module, policies[place].resolve(module), "cpu")
            for step in range(options.warmup + options.steps):
                if step == options.warmup:
                    start = time.process_time()
                with attachment.context():
                    loss = module.training_step(module.batch, 0)
                loss.backward()
                module.zero_grad()
            found[place].append((time.process_time() - start) / options.steps)
            attachment.detach()
    return found


def compared(name: str, options: object) -> dict:
    """All that is said of one model."""
    torch.manual_seed(options.seed)
    kind, width = MODELS[name]
    module = kind(width // 4 if options.quick else width)
    costs = measure_costs(module, [module.batch], ["bf16"])
    policies = six(costs, module)
    measured = times(module, [folded_policy(module, each) for each in policies.values()], options)
    rows = []
    for (policy, formats), taken in zip(policies.items(), measured, strict=True):
        low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
        rows.append({"policy": policy, "predicted": costs.of_step(formats).seconds, "measured": middle,
                     "low": low, "high": high})  # fmt: skip
    apart = [pair for pair in itertools.combinations(rows, 2) if _are_apart(*pair)]
    right = sum((a["predicted"] < b["predicted"]) == (a["measured"] < b["measured"]) for a, b in apart)
    about = {"model": name, **errors_of_memory(module, costs, options)}
    return {**about, "pairs": len(apart), "right": right, "times": rows}


def _are_apart(one: dict, other: dict) -> bool:
    return one["high"] < other["low"] or other["high"] < one["low"]


def table(lines: list[dict]) -> str:
    """What was found, as text."""
    found = ["model        saved bytes  peak   order of policies by time"]
    for line in lines:
        order = f"{line['right']} of {line['pairs']} pairs that differ by more than the noise are right"
        found.append(f"{line['model']:<12} {line['saved_error']:>10.1%} {line['peak_error']:>6.1%}   {order}")
        for row in line["times"]:
            span = f"{row['measured'] * 1e3:8.2f} ms [{row['low'] * 1e3:.2f}, {row['high'] * 1e3:.2f}]"
            found.append(f"    {row['policy']:<16} predicted {row['predicted'] * 1e3:8.2f} ms, measured {span}")
    return "\n".join(found)


def main() -> None:
    """Compare and report."""
    parser = arguments(__doc__, ["bf16"], rounds=7, steps=5, models=list(MODELS))
    parser.add_argument("--policies", type=int, default=24, help="policies at random for which memory is compared")
    parser.set_defaults(warmup=2, device="cpu")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.warmup, options.policies = 2, 1, 1, 3
    prepare(options)
    warnings.filterwarnings("ignore")
    lines = [compared(name, options) for name in options.models]
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
