"""``torchscript``: a traced module, for what still loads TorchScript."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from lightning_mixprec.deploy.exporting.closeness import tensors_of
from lightning_mixprec.deploy.exporting.layer_formats import check_layers
from lightning_mixprec.deploy.exporting.protocol import Job, Opened
from lightning_mixprec.deploy.exporting.script_graphs import ScriptReader
from lightning_mixprec.errors import ExportError, one_line
from lightning_mixprec.plugin.lightnings import is_lightning_module

DEPRECATED = (
    "torch has deprecated TorchScript (since 2.11) and repairs it no longer; prefer export(format='pt2') where what "
    "loads the file can read it"
)


class TorchScript:
    """Files that ``torch.jit.load`` reads."""

    name = "torchscript"

    def check(self, path: Path, job: Job) -> None:
        """Nothing is known before it is traced, but that its sizes are the example's.

        Raises:
            ExportError: Dynamic shapes are asked for.
        """
        if job.options.dynamic_shapes is not None:
            raise ExportError("a torchscript file has no dynamic_shapes; leave them out, or export to 'pt2'")

    def write(self, path: Path, job: Job) -> None:
        """Traces the module on the example; what has a name there is taken by position, after the others."""
        try:
            job.model.names = tuple(job.example.kwargs)
            inputs = (*job.example.args, *job.example.kwargs.values())
            with _reading_properties(job.model):
                torch.jit.save(torch.jit.trace(job.model, inputs, check_trace=False, strict=False), str(path))
        except Exception as error:  # whatever the module's code meets under a tracer
            raise ExportError(
                f"torch.jit.trace cannot trace {type(job.model.module).__name__}.forward: {one_line(error)[:300]}; "
                "export it to 'pt2'"
            ) from error
        finally:
            job.model.names = ()

    def opened(self, path: Path, job: Job) -> Opened:
        """Loads it, and runs its graphs operation by operation to see what each takes."""
        model = torch.jit.load(str(path))
        reader = ScriptReader(model)
        try:
            uses = reader.uses(job.example)
        except ExportError:
            check_layers(reader.seen, job.layers, self.name)  # an earlier layer may be why this one does not run
            raise
        inputs = (*job.example.args, *job.example.kwargs.values())
        return Opened(lambda: tensors_of(model(*inputs)), uses, True)


@contextlib.contextmanager
def _reading_properties(model: torch.nn.Module) -> Iterator[None]:
    """With the switch of LightningModules on that has them answer torch.jit, which reads all their properties."""
    switched = [each for each in model.modules() if is_lightning_module(each)]
    for each in switched:
        vars(each)["_jit_is_scripting"] = True
    try:
        yield
    finally:
        for each in switched:
            del vars(each)["_jit_is_scripting"]


def warn_of_deprecation() -> None:
    """The one line that this needs to be told."""
    warnings.warn(DEPRECATED, FutureWarning, stacklevel=3)
