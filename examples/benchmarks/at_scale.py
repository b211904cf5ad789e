"""Print on paper what a sample and a move take for large models: formulas with measured and published constants.

    python examples/benchmarks/at_scale.py

Nothing is run. The guide examples/guides/at_scale.md says what stands for what.
"""

from dataclasses import dataclass

# Published by the makers (H100 SXM: dense bf16, and fp32 without tensor cores), and usual for large runs.
BF16_RATE, FP32_RATE = 989e12, 67e12  # flops per second of a GPU
BF16_USE, FP32_USE = 0.4, 0.8  # share of them that a model attains
LINK = 50e9  # bytes per second between nodes for each GPU

# Counted: tests/distributed/test_messages.py and examples/benchmarks/layers.py.
MESSAGES = 2  # of a sample
SENT_PER_LAYER = 18_672  # bytes of them
WRITTEN_PER_LAYER = 134  # bytes of the journal for three monitors
STATE_PER_LAYER = 280  # bytes of a checkpoint for three monitors

# Defaults of the callbacks.
EVERY, MAX_LAYERS, MAX_TRIALS = 1000, 1000, 48


@dataclass(frozen=True)
class Run:
    """A run: parameters, modules that are layers, groups of FSDP2, tokens of a step on each GPU, GPUs."""

    name: str
    parameters: float
    layers: int
    groups: int
    tokens: int = 8192
    gpus: int = 64

    def step(self, rate: float, width: int) -> float:
        """Seconds of a forward and backward: arithmetic or messages, whichever takes longer."""
        arithmetic = 6 * self.parameters * self.tokens / rate
        messages = 3 * width * self.parameters * (self.gpus - 1) / self.gpus / LINK
        return max(arithmetic, messages)


RUNS = (Run("8B", 8e9, 32 * 13 + 4, 32), Run("70B", 70e9, 80 * 13 + 4, 80))


def rows(run: Run) -> dict[str, str]:
    """What is said of a run."""
    low, wide = run.step(BF16_RATE * BF16_USE, 2), run.step(FP32_RATE * FP32_USE, 4)
    looked_at = min(run.layers, MAX_LAYERS)
    share, group = 4 * run.parameters / run.gpus, 4 * run.parameters / run.groups
    return {
        "an ordinary step (s)": f"{low:.1f}",
        "a replay in fp32 (s)": f"{wide:.1f}",
        "a sample: a replay in fp32 and one in bf16 (s)": f"{wide + low:.1f}",
        "the same as a share of 1000 steps": f"{(wide + low) / (EVERY * low):.1%}",
        "a move, of one trial (s)": f"{wide + 2 * low:.0f}",
        "a move, of all 48 trials (s)": f"{wide + (1 + MAX_TRIALS) * low:.0f}",
        "layers that a sample looks at": f"{looked_at:,} of {run.layers:,}",
        "messages of a sample beside the replays'": f"{MESSAGES}",
        "bytes of them (MB)": f"{looked_at * SENT_PER_LAYER / 1e6:.1f}",
        "journal, each sample (MB)": f"{looked_at * WRITTEN_PER_LAYER / 1e6:.1f}",
        "checkpoint (MB)": f"{run.layers * STATE_PER_LAYER / 1e6:.1f}",
        "memory of a sample on a GPU, sharded (GB)": f"{(2 * share + group) / 1e9:.1f}",
    }


def main() -> None:
    """Print the table."""
    tables = [rows(run) for run in RUNS]
    print(f"{'on paper, 64 GPUs':<48}" + "".join(f"{run.name:>16}" for run in RUNS))
    for key in tables[0]:
        print(f"{key:<48}" + "".join(f"{table[key]:>16}" for table in tables))


if __name__ == "__main__":
    main()
