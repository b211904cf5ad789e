"""What every kind of file can do: write a traced module, and be opened again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightning_mixprec.deploy.exporting.example import Example
from lightning_mixprec.deploy.exporting.formatted import Formatted
from lightning_mixprec.deploy.exporting.layer_formats import Use
from lightning_mixprec.deploy.exporting.programs import Program, program_of
from lightning_mixprec.errors import ExportError
from lightning_mixprec.policy.assignment import LayerPrecision


@dataclass(frozen=True)
class Options:
    """What a user may say of a file.

    Attributes:
        dynamic_shapes: As ``torch.export`` takes them, by argument of the module's forward.
        opset: The opset of an ONNX file; None for torch's own choice.
        external_data: Whether an ONNX file's weights are in a file beside it.
    """

    dynamic_shapes: Any = None
    opset: int | None = None
    external_data: bool = False


@dataclass(frozen=True)
class Job:
    """A module that is to be written, while its formats are in force.

    Attributes:
        model: The module.
        example: The example inputs.
        layers: What its layers are assigned.
        options: What the user says of the file.
    """

    model: Formatted
    example: Example
    layers: Mapping[str, LayerPrecision]
    options: Options = field(default_factory=Options)

    @cached_property
    def program(self) -> Program:
        """The module as a graph in which every cast is an operation; traced once."""
        return program_of(self.model, self.example, self.options.dynamic_shapes)


@dataclass(frozen=True)
class Opened:
    """A file that was opened again.

    Attributes:
        run: Runs it on the example; its tensors, in their order.
        uses: The operations in its graph.
        is_exact: Whether it computes with torch's own kernels, operation by operation, as the module does.
    """

    run: Callable[[], list[Tensor]]
    uses: list[Use]
    is_exact: bool


class FileFormat(Protocol):
    """A kind of file.

    Attributes:
        name: What users call it.
    """

    name: str

    def check(self, path: Path, job: Job) -> None:
        """Checks what can be checked before anything is traced.

        Raises:
            ExportError: A package is missing, or a layer's format has no operation in such files.
        """

    def write(self, path: Path, job: Job) -> None:
        """Writes a file, and what belongs beside it."""

    def opened(self, path: Path, job: Job) -> Opened:
        """Opens what was written."""


def missing(package: str, instead: str) -> ExportError:
    """The error for a package that is not installed.

    Args:
        package: Its name.
        instead: What can be done without it.
    """
    return ExportError(
        f"this export needs {package}, which is not installed; try pip install 'lightning_mixprec[export]', "
        f"or {instead}"
    )
