"""One process under FSDP1 on the CPU: writes a checkpoint of PerLayerFSDPPrecision, or goes on from one.

python fsdp_script.py write CHECKPOINT
python fsdp_script.py resume CHECKPOINT OUTCOME
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from compatibility.old_models import Line, Saving, constant
from compatibility.old_runs import LOUD, outcome, trainer_of
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_mixprec import PerLayerFSDPPrecision

POLICY = {"default": "fp16", "parts.head": "fp32"}
SCALING = {"init_scale": 2048.0, "growth_interval": 3}


class OnTheCPU(FSDPStrategy):
    """Lightning's strategy wants a GPU; torch's FSDP runs on a CPU that is named to it."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def values():
    return constant(1.0, LOUD, 0.5, LOUD, 1.0, 2.0)


def fit(folder, *callbacks, path=None):
    plugin, model = PerLayerFSDPPrecision(POLICY, loss_scaling=SCALING), Line()
    strategy = OnTheCPU(process_group_backend="gloo", state_dict_type="full")
    trainer = trainer_of(plugin, callbacks, folder, strategy=strategy)
    trainer.fit(model, values(), ckpt_path=path)
    return outcome(model, trainer, plugin, [])


def main(what, path, told=None):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if what == "write":
            fit(folder, Saving(path, batch=2))
        else:
            Path(told).write_text(json.dumps(fit(folder, path=path)))


if __name__ == "__main__":
    main(*sys.argv[1:])
