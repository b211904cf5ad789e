"""What every kind of file can do: write a traced module, and be opened again."""

import os
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

LEAST_OPSET = 18
"""torch's exporter writes this one and later ones; to earlier ones it converts, and the layers' names get lost."""


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


_SUFFIXES = {
    ".pt2": ("pt2", "aoti"),
    ".onnx": ("onnx",),
    ".safetensors": ("weights",),
    ".ts": ("torchscript",),
    **dict.fromkeys((".pt", ".pth"), ("pt2", "torchscript", "weights")),
    **dict.fromkeys((".bin", ".ckpt"), ("weights",)),
}
"""The kinds of files that are called so."""


def read_path(path: object, format: str) -> Path:
    """The path of a file of a kind.

    Raises:
        ExportError: It is none, or is called as files of another kind are.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ExportError(f"path is {path!r}; give the path of the file that is to be written")
    read = Path(path)
    if format not in (kinds := _SUFFIXES.get(read.suffix, (format,))):
        suffix = next(suffix for suffix, kinds in _SUFFIXES.items() if format in kinds)
        raise ExportError(
            f"{read.name!r} is called as a file of {' or '.join(kinds)} is, and the format is {format!r}; say "
            f"format={kinds[0]!r}, or end the path in {suffix}"
        )
    return read


def check_options(options: Options, format: str) -> None:
    """Raises for an option that is malformed, or that files of this kind do not have."""
    opset, external = options.opset, options.external_data
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int) or opset < LEAST_OPSET):
        raise ExportError(
            f"opset is {opset!r}; give a whole number from {LEAST_OPSET} on, which is the least that torch writes, or "
            "leave it out"
        )
    if not isinstance(external, bool):
        raise ExportError(f"external_data is {external!r}; it is True or False")
    if format != "onnx" and (opset is not None or external):
        given = "opset" if opset is not None else "external_data"
        raise ExportError(f"{given} is for files of onnx, and the format is {format!r}; leave it out")
