"""An example in two processes under DDP ends as it does in one: with its summary, said once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.mark.slow
def test_two_processes_say_their_summary_once(tmp_path: Path) -> None:
    script, config = ROOT / "examples" / "pinn.py", ROOT / "examples" / "configs" / "pinn.yaml"
    done = subprocess.run(
        [sys.executable, str(script), "fit", f"--config={config}", *LIMITS, *TWO],
        cwd=tmp_path,
        # A process that is aborted says where it was.
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("optimizer steps:") == 1
    assert (tmp_path / "lightning_logs" / "version_0" / "precision_report.html").is_file()
