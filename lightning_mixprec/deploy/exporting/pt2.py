"""``pt2``: a program of ``torch.export``, which torch alone loads and runs."""

from pathlib import Path

import torch

from lightning_mixprec.deploy.exporting.closeness import tensors_of
from lightning_mixprec.deploy.exporting.programs import uses_in
from lightning_mixprec.deploy.exporting.protocol import Job, Opened


class Pt2:
    """Files that ``torch.export.load`` reads, without this package."""

    name = "pt2"

    def check(self, path: Path, job: Job) -> None:
        """Nothing: such files hold whatever torch computes."""

    def write(self, path: Path, job: Job) -> None:
        """Writes the program."""
        torch.export.save(job.program.exported, path)

    def opened(self, path: Path, job: Job) -> Opened:
        """Reads it as anybody would."""
        loaded = torch.export.load(path)
        model = loaded.module()
        return Opened(
            lambda: tensors_of(model(*job.example.args, **job.example.kwargs)), uses_in(loaded), job.program.is_exact
        )
