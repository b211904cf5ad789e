"""The rescue suite: runs that fp16 loses, and what AdaptivePrecision at its default arguments makes of them.

    python examples/benchmarks/rescue.py --device cpu --output examples/benchmarks/results/rescue-cpu.json
    python examples/benchmarks/rescue.py --cases ffn rotary --controls --seeds 1

Each case is a small model that fails in fp16 for a documented reason (examples/benchmarks/rescue_cases says which and
where it was met). It is trained in fp32, by Lightning's own 16-mixed and bf16-mixed, and by PerLayerPrecision("fp16")
with AdaptivePrecision(), from the same weights on the same batches. The final loss is that of held-out batches,
predicted in eval mode in the formats of the run and judged in fp32. A case passes if, over all seeds,

    a  16-mixed fails in every run: NaN, or at least 1.2 times the fp32 loss (otherwise the case is void)
    b  our loss is at most 1.05 times that of fp32, or within two standard deviations of fp32 over the seeds
    c  weights, buffers, eval-mode predictions and losses are finite
    d  at most 5 % of the steps were skipped
    e  at least 80 % of the matmul FLOPs are in at most 16 bits at the end, as counted here, not by the controller
    f  in each run a known culprit was promoted (or nothing, in the two cases that a guarded buffer or a larger loss
       scale can save), and at least half of what was promoted are culprits, in the mean over the runs

Healthy controls pass if nothing moves and the loss is as in b; their overhead is the time of training with and without
the controller, in rounds of both, as the median of the ratios with its quartiles.
"""

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import prepare, report, save, spread, written
from rescue_cases import CASES, CONTROLS, Case
from rescue_cases.runs import LOW, STOCK, Outcome, run_case

FAILS, AS_GOOD, SKIPPED, LOW_SHARE, PRECISION = 1.2, 1.05, 0.05, 0.8, 0.5


@dataclass(frozen=True)
class Verdict:
    """What the runs of one case come to.

    Attributes:
        checks: letter of the rule to whether it holds.
        share: of the matmul FLOPs in at most 16 bits, the least over the seeds.
        promoted: layers that ended in another format than fp16, and in which, by seed.
        precision, recall: of the promoted layers against the culprits, the mean over the seeds.
        first, last: the steps of the first and of the last move, by seed.
    """

    checks: dict[str, bool]
    share: float
    promoted: list[dict[str, str]]
    precision: float
    recall: float
    moves: list[int]
    first: list[int | None]
    last: list[int | None]

    @property
    def is_void(self) -> bool:
        """Whether the control did not fail, so that there was nothing to rescue."""
        return not self.checks.get("a", True)

    def __str__(self) -> str:
        if self.is_void:
            return "void"
        failed = [letter for letter, holds in self.checks.items() if not holds]
        return f"no: {' '.join(failed)}" if failed else "yes"


def mean(runs: Sequence[Outcome]) -> float:
    """Return the mean final loss."""
    return statistics.fmean(run.loss for run in runs)


def fails(control: Outcome, reference: Outcome) -> bool:
    """Whether a run is lost, compared with fp32 from the same seed."""
    return not (control.is_finite and control.loss < FAILS * reference.loss)


def is_as_good(ours: Sequence[Outcome], reference: Sequence[Outcome]) -> bool:
    """Whether the loss is that of fp32, or within its spread over seeds."""
    deviation = statistics.stdev(run.loss for run in reference) if len(reference) > 1 else 0.0
    return mean(ours) <= max(AS_GOOD * mean(reference), mean(reference) + 2 * deviation)


def low_share(run: Outcome, flops: dict[str, int]) -> float:
    """Return the share of FLOPs that a run ended with in at most 16 bits."""
    return sum(count for name, count in flops.items() if run.formats.get(name) in LOW) / max(sum(flops.values()), 1)


def promoted(run: Outcome) -> dict[str, str]:
    """Return the layers that ended in another format than they began with."""
    return {name: given for name, given in run.formats.items() if given != "fp16"}


def hits(case: type[Case], run: Outcome) -> tuple[float, float]:
    """Return precision and recall of one run; any culprit is as good as all of them."""
    moved = promoted(run)
    found = [name for name in moved if name in case.culprits]
    return len(found) / len(moved) if moved else float(not case.must_move), float(bool(found) or not case.must_move)


def judge(case: type[Case], runs: dict[str, list[Outcome]], is_control: bool) -> Verdict:
    """Hold the runs of a case against the rule."""
    ours, reference = runs["ours"], runs["fp32"]
    precision, recall = (statistics.fmean(each) for each in zip(*(hits(case, run) for run in ours), strict=True))
    share = min(low_share(run, reference[0].flops) for run in ours)
    steps = [[entry["step"] for entry in run.history] for run in ours]
    checks = {
        "b": is_as_good(ours, reference),
        "c": all(run.is_finite for run in ours),
        "d": all(run.skipped <= SKIPPED * run.steps for run in ours),
        "e": share >= LOW_SHARE,
        "f": recall == 1 and precision >= PRECISION,
    }
    if is_control:
        checks = {"b": checks["b"], "c": checks["c"], "moves": not any(steps)}
    else:
        control = zip(runs["16-mixed"], reference, strict=True)
        checks = {"a": all(fails(*pair) for pair in control), **checks}
    first, last = ([choose(each, default=None) for each in steps] for choose in (min, max))
    moves = [len(each) for each in steps]
    return Verdict(checks, share, [promoted(run) for run in ours], precision, recall, moves, first, last)


def overhead(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the ratio of training times with and without the controller, in rounds of both."""
    order = random.Random(0)
    times: dict[str, list[float]] = {"ours": [], "fp16": []}
    for _ in range(options.rounds):
        for how in order.sample([*times], 2):
            times[how].append(run_case(name, 0, how, options.device, options.overhead_steps).seconds)
    return spread(times["ours"], times["fp16"])


def measure(name: str, case: type[Case], is_control: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in all ways and seeds; a line of the report."""
    ways = STOCK if options.without_ours else (*STOCK, "ours")
    runs = {how: [run_case(name, seed, how, options.device) for seed in range(options.seeds)] for how in ways}
    line = {"case": name, "control": is_control, "title": case.title, "mechanism": case.mechanism}
    line |= {"source": case.source, "culprits": case.culprits, "format": case.format}
    line["runs"] = [asdict(run) for each in runs.values() for run in each]
    line["loss"] = {how: mean(each) for how, each in runs.items()}
    line["skipped"] = {how: [run.skipped for run in each] for how, each in runs.items()}
    line["control_fails"] = all(fails(*pair) for pair in zip(runs["16-mixed"], runs["fp32"], strict=True))
    if not options.without_ours:
        verdict = judge(case, runs, is_control)
        line |= {"verdict": asdict(verdict), "passes": str(verdict)}
        if is_control and options.rounds:
            line["overhead"] = overhead(name, options)
    return line


def number(value: float) -> str:
    """Return a loss as the table shows it."""
    return f"{value:.3g}" if math.isfinite(value) else "NaN"


def cells(line: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    row = [line["case"], *(number(line["loss"][how]) for how in STOCK), _range(line["skipped"]["16-mixed"])]
    if "verdict" not in line:
        return [*row, "fails" if line["control_fails"] else "trains"]
    verdict = line["verdict"]
    row += [number(line["loss"]["ours"]), _range(line["skipped"]["ours"]), f"{100 * verdict['share']:.0f} %"]
    row += [_range(verdict["moves"]), _range(verdict["first"]), _range(verdict["last"])]
    row += [f"{verdict['precision']:.2f}", f"{verdict['recall']:.2f}"]
    return [*row, line["passes"] + (f", {written(line['overhead'])}" if "overhead" in line else "")]


def _range(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{min(known)}" if min(known) == max(known) else f"{min(known)} to {max(known)}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as an aligned Markdown table."""
    head = ["case", *STOCK, "its skips"]
    if "verdict" in lines[0]:
        head += ["ours", "skips", "low share", "moves", "first", "last", "precision", "recall", "pass"]
    else:
        head += ["16-mixed"]
    rows = [head, *(cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES], metavar="CASE")
    parser.add_argument("--controls", nargs="*", choices=[*CONTROLS], default=[*CONTROLS], metavar="CONTROL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of timing the controls; 0 times nothing")
    parser.add_argument("--overhead-steps", type=int, default=1000, help="of a run that is timed")
    parser.add_argument("--without-ours", action="store_true", help="only see how Lightning's own formats do")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def main() -> None:
    """Run, print, write."""
    options = parse()
    prepare(options)
    chosen = [(name, CASES[name], False) for name in options.cases]
    chosen += [(name, CONTROLS[name], True) for name in options.controls]
    lines = []
    for name, case, is_control in chosen:
        lines.append(measure(name, case, is_control, options))
        print(" ".join(cells(lines[-1])), flush=True)
        save(lines, options)
    report(lines, table(lines), options)


if __name__ == "__main__":
    main()
