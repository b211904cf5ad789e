"""Writes what ``data`` holds; README.md has the command and the release that it was run with."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compatibility.old_models import Eventful, Lessons, Line, Tossed, random_batches
from compatibility.old_runs import DATA, RUNS, events, resume, rows_of, stock, trainer_of, write
from lightning.pytorch.loggers import CSVLogger

from lightning_mixprec import OverflowMonitor, PerLayerPrecision, PrecisionPolicy, UnderflowMonitor, diagnose

SHORT = """default: fp16
parts.head: fp32
"blocks.[-1:]": bf16              # the last one
"parts.g*": c=fp32,o=input
"""
FULL = """default: bf16
rules:
  - {layers: "blocks.*", compute: fp32, recurse: false}
  - {types: [Gate, "*Norm*"], compute: fp16, output: input}
  - {layers: "re:parts\\\\.(stem|head)", param: fp64, compute: fp64}
allow_unmatched: true
"""


def store(name: str, told: Any, is_exact: bool = True) -> None:
    """Writes a JSON file; what is compared with a tolerance is written with nine digits."""
    text = json.dumps(told if is_exact else shortened(told), separators=(",", ":"), ensure_ascii=False)
    (DATA / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def shortened(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {key: shortened(entry) for key, entry in value.items()}
    return [shortened(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_runs() -> None:
    """A checkpoint of each run, and what the run comes to that goes on from it."""
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            write(run, DATA / f"{name}.pt", Path(first) / "run")
            store(name, resume(run, DATA / f"{name}.pt", Path(second)), run.is_exact)
            if name == "everybody":
                keep_folder(Path(first) / "run")


def keep_folder(folder: Path) -> None:
    """What a run with all callbacks left in its log directory, but for the HTML."""
    for name in ("mixprec.jsonl", "precision_report.json", "learned_policy.yaml"):
        shutil.copy(folder / name, DATA / "run" / name)


def write_stock_run() -> None:
    """The log directory of a run under Lightning's own plugin without PrecisionReport, with a CSVLogger."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        callbacks = [OverflowMonitor(), UnderflowMonitor(every_n_steps=5)]
        logger = CSVLogger(folder, name="", version="stock_run")
        trainer = trainer_of(stock(init_scale=2.0**19), callbacks, Path(folder), logger=logger, log_every_n_steps=1)
        trainer.fit(Eventful(), events())
        for name in ("mixprec.jsonl", "metrics.csv"):
            shutil.copy(Path(folder) / "stock_run" / name, DATA / "stock_run" / name)


def write_reports() -> None:
    """The reports that the command makes of the two log directories."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("run", "stock_run"):
            shutil.copytree(DATA / name, Path(folder) / name)
        for output, runs in {"stock_report": ["stock_run"], "comparison": ["run", "stock_run"]}.items():
            command = [sys.executable, "-m", "lightning_mixprec.report", *runs, "--output", f"{output}.html"]
            subprocess.run(command, cwd=folder, check=True)
            shutil.copy(Path(folder) / f"{output}.json", DATA / f"{output}.json")


def write_saved_batch() -> None:
    """The batch of a failed step with random numbers, the model that failed, and what diagnose says of them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = Tossed()
        policy = {"default": "fp16", "head": "bf16"}
        plugin = PerLayerPrecision(policy, loss_scaling={"init_scale": 256.0})
        trainer = trainer_of(plugin, [OverflowMonitor(save_batch=True)], Path(folder))
        trainer.fit(model, Lessons(random_batches(1, size=4)))
        (saved,) = Path(folder).glob("overflow-step*.pt")
        shutil.copy(saved, DATA / saved.name)
        torch.save(model.state_dict(), DATA / "diagnosed_model.pt")
        store("diagnosis", {"file": saved.name, "found": diagnose(model, str(saved))}, is_exact=False)


def write_policies() -> None:
    """Policies as users write them, and what they come to on a model."""
    (DATA / "policy_short.yaml").write_text(SHORT)
    (DATA / "policy_full.yaml").write_text(FULL)
    told = {}
    models = {"policy_short.yaml": Line(), "policy_full.yaml": Line(), "run/learned_policy.yaml": Eventful()}
    for name, model in models.items():
        policy = PrecisionPolicy.from_file(DATA / name)
        told[name] = {"policy": policy.to_dict(), "layers": resolved(policy, model)}
    store("policies", told)


def resolved(policy: PrecisionPolicy, model: torch.nn.Module) -> dict[str, Any]:
    """By layer its three formats, and which rule decided."""
    return {
        name: [layer.param, layer.compute, layer.output, None if layer.rule is None else policy.rules.index(layer.rule)]
        for name, layer in policy.resolve(model).items()
    }


def write_sharded() -> None:
    """A checkpoint of PerLayerFSDPPrecision and what comes of it; in a process of its own, on the CPU."""
    script, path = Path(__file__).parent / "fsdp_script.py", DATA / "fsdp.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for arguments in (["write", path], ["resume", path, DATA / "fsdp.json"]):
        subprocess.run([sys.executable, script, *map(str, arguments)], env=environment, check=True)


def main() -> None:
    """Writes everything anew."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    shutil.rmtree(DATA, ignore_errors=True)
    for folder in ("run", "stock_run"):
        (DATA / folder).mkdir(parents=True)
    write_runs()
    write_stock_run()
    write_reports()
    write_saved_batch()
    write_policies()
    write_sharded()
    kinds = sorted({f"{row['monitor']}: {key}" for row in rows_of(DATA / "run") for key in row})
    print("\n".join(kinds))


if __name__ == "__main__":
    main()
