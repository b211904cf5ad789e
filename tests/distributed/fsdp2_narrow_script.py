"""What one of two processes does in test_fsdp2_narrow.py: runs on sharded weights that a policy stores in 16 bits."""

import os
import sys
from pathlib import Path

import torch
from exact_gradients import adamw, outcome, ran
from lightnings import ModelCheckpoint, ModelParallelStrategy, pl
from torch.distributed.tensor import DTensor
from uneven_shards import CONFIGURED, ByHand, Together, Uneven, undamped

from lightning_mixprec import MixPrecError

RANK = int(os.environ.get("LOCAL_RANK", 0))


class Looks(pl.Callback):
    """Notes how shards are stored while they are trained, and how many of this rank's there are."""

    def on_train_end(self, trainer, module):
        self.stored = {name: str(param.dtype) for name, param in module.named_parameters()}
        self.sizes = [param.to_local().numel() for param in module.parameters()]


def sharded(module=Uneven, stored="bf16", callbacks=(), **options):
    looks = Looks()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    options = {"strategy": strategy, "devices": 2, **options}
    trainer, run = ran(stored, module, callbacks=lambda: [looks, *callbacks], **options)
    found = outcome(trainer, run)
    return {
        "looks": {"stored": looks.stored, "sizes": looks.sizes},
        "outcome": {name: whole(value) for name, value in found.items()},
    }


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def resumed(folder, stored, configure):
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    sharded(Uneven, stored, [keep], configure=configure, max_epochs=2, enable_checkpointing=True)
    return sharded(Uneven, stored, configure=configure, ckpt_path=folder / "epoch=1.ckpt")


def refused(*args, **options):
    try:
        sharded(*args, **options)
    except MixPrecError as error:
        return str(error)
    return None


def main(folder):
    results = {}
    for stored in ("bf16", "fp16"):
        for name, configure in CONFIGURED.items():
            results[stored, name] = sharded(stored=stored, configure=configure)
        results[stored, "by hand"] = sharded(ByHand, stored)
        results[stored, "resumed exact"] = resumed(folder / stored, stored, adamw)
        results[stored, "resumed undamped"] = resumed(folder / f"{stored} sgd", stored, undamped)
        results[stored, "together"] = refused(Together, stored)
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
