"""``export``: a file of a trained module in which every layer's format stands, checked by opening it again."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixprec.deploy.exporting.aoti import Aoti
from lightning_mixprec.deploy.exporting.closeness import (
    CLOSE,
    ROOM,
    are_identical,
    check_same_outputs,
    largest_difference,
    last_place,
    relative_difference,
    tensors_of,
)
from lightning_mixprec.deploy.exporting.example import Example, forward_of, read_example
from lightning_mixprec.deploy.exporting.formatted import Formatted, formatted
from lightning_mixprec.deploy.exporting.layer_formats import check_layers, read_layers
from lightning_mixprec.deploy.exporting.onnx_files import Onnx
from lightning_mixprec.deploy.exporting.protocol import FileFormat, Job, Opened, Options, check_options, read_path
from lightning_mixprec.deploy.exporting.pt2 import Pt2
from lightning_mixprec.deploy.exporting.torchscript import TorchScript, warn_of_deprecation
from lightning_mixprec.deploy.exporting.weights import Weights
from lightning_mixprec.deploy.exporting.without_bf16 import Ranges, without_bf16
from lightning_mixprec.errors import ExportError, MixPrecError, one_line
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.numerics.ranges import read_ranges
from lightning_mixprec.policy.assignment import LayerPrecision
from lightning_mixprec.policy.module_names import unwrap
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy
from lightning_mixprec.records.atomic_files import drafted

_FORMATS: dict[str, FileFormat] = {each.name: each for each in (Pt2(), Aoti(), Onnx(), TorchScript(), Weights())}


class _NotRunError(ExportError):
    """The module cannot be run under its policy here.

    Args:
        message: For the user.
        reason: What torch said.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Export:
    """A file that was written, opened again, run and found to be what was promised.

    Attributes:
        path: The file.
        format: What kind of file it is.
        layers: The format of each layer that computes, by its name, read back from the written graph: that of its
            products; of a layer without products the widest that its operations take, which autocast may leave wider
            than the policy says. Of ``"weights"``: what each layer's weights are written in.
        max_difference: The largest difference between an element of its outputs and of the module's, under the same
            policy, on the example; NaN where that cannot be run here.
        not_run: Why not, in one line; None where it was run. Of ``"weights"`` alone, which are read back all the same.
    """

    path: Path
    format: str
    layers: Mapping[str, str]
    max_difference: float
    not_run: str | None = None

    def __str__(self) -> str:
        """The file, and how many layers are in which format."""
        counts = {format: list(self.layers.values()).count(format) for format in dict.fromkeys(self.layers.values())}
        layers = ", ".join(f"{count} in {format}" for format, count in counts.items())
        compared = self.not_run or f"largest difference {self.max_difference:.3g}"
        return f"{self.path} ({self.format}): layers {layers or 'none'}; {compared}"


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    policy: str | Mapping[str, Any] | os.PathLike[str] | PrecisionPolicy,
    example_inputs: Any,
    format: str = "pt2",
    dynamic_shapes: Any = None,
    opset: int | None = None,
    external_data: bool = False,
    bf16_as: str | None = None,
    ranges: Ranges | None = None,
) -> Export:
    """Writes a module to a file in which each layer computes as a policy says, and checks the file.

    The file is opened again, run on the example, compared with the module under the same policy (``emulate=False``, in
    eval mode), and each layer's format is read back from the written graph. It stands at its path only if all is as
    promised. Nothing of the module changes.

    Args:
        module: The module, on the device where it is to compute; a LightningModule, or any other with a forward.
        path: The file; its folder is made. ``"aoti"`` wants ``.pt2``, ``"weights"`` writes safetensors where it ends
            in ``.safetensors``.
        policy: A format name, a mapping, a path or a ``PrecisionPolicy``.
        example_inputs: What forward takes: a tensor, a tuple of arguments, or a mapping of arguments by name.
        format: ``"pt2"``: a program of ``torch.export``, equal to the module bit by bit. ``"aoti"``: compiled by
            AOTInductor. ``"onnx"``. ``"torchscript"``: traced, which torch has deprecated. ``"weights"``: weights
            alone, each in the format that its layer computes in.
        dynamic_shapes: Sizes that may vary, as ``torch.export`` takes them, by argument of the module's forward.
        opset: The opset of an ONNX file; None for torch's choice.
        external_data: Whether an ONNX file's weights are in a file beside it.
        bf16_as: ``"fp32"`` or ``"fp16"``: what layers in bf16 become, for what runs the file and has no bf16. fp16
            needs ranges.
        ranges: The largest magnitude seen in each layer's output, by its name, or the log directory of a run with
            ``UnderflowMonitor``.

    Raises:
        ExportError: The module cannot be exported so, or the file is not what was promised; none is left.
        PolicyError: The policy is not one of this module.

    >>> import tempfile
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = export(model, f"{folder}/model.pt2", policy={"default": "fp32", "0": "bf16"},
    ...                   example_inputs=torch.ones(1, 4))
    >>> made.layers["0"], made.layers["2"], made.max_difference
    ('bf16', 'fp32', 0.0)
    """
    kind = _kind_of(format)
    file, options = read_path(path, format), Options(dynamic_shapes, opset, external_data)
    check_options(options, format)
    if ranges is not None and bf16_as is None:
        raise ExportError("ranges are for bf16_as='fp16', and it is None; say bf16_as, or leave ranges out")
    forward_of(module)
    module = unwrap(module)
    example = read_example(module, example_inputs)
    layers = _assigned(policy, module)
    if bf16_as is not None:
        weighted = [name for name, each in module.named_modules() if any(True for _ in each.parameters(recurse=False))]
        layers = without_bf16(layers, bf16_as, {} if ranges is None else read_ranges(ranges), weighted)
    if format == "torchscript":
        warn_of_deprecation()
    device = next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    with formatted(module, layers, device) as model:
        job = Job(model, example, layers, options)
        kind.check(file, job)
        try:
            return _written(kind, file, job, _expected(model, example, device))
        except _NotRunError as error:
            if not isinstance(kind, Weights):
                raise
            with model.in_fp32():
                _expected(model, example, device)  # the example fits
            return _written(kind, file, job, f"it was not run, as this device cannot ({error.reason})")


def _kind_of(format: object) -> FileFormat:
    if not isinstance(format, str) or format not in _FORMATS:
        raise ExportError(f"export was asked for the format {format!r}; it is one of {', '.join(map(repr, _FORMATS))}")
    return _FORMATS[format]


def _assigned(policy: Any, module: nn.Module) -> dict[str, LayerPrecision]:
    assignment = as_policy(policy).resolve(module)
    return {name: replace(layer, output=assignment.hands_on(name)) for name, layer in assignment.items()}


def _expected(model: Formatted, example: Example, device: torch.device) -> list[Tensor]:
    """The module's outputs, which are those of another call, too: else no file could be compared with them."""
    random = RandomState(device)
    expected = _outputs(model, example)
    random.restore()
    again = _outputs(model, example)
    shapes = [[each.shape for each in outputs] for outputs in (expected, again)]
    if shapes[0] != shapes[1] or relative_difference(again, expected) > CLOSE:
        raise ExportError(
            f"{type(model.module).__name__}.forward returns something else when it is called again, so no file can be "
            "held against it; let what it keeps from call to call (a state, a counter) be an argument and an output"
        )
    return expected


def _outputs(model: Formatted, example: Example) -> list[Tensor]:
    try:
        return tensors_of(model(*example.args, **example.kwargs))
    except MixPrecError:
        raise
    except Exception as error:  # of the module's own code
        reason = one_line(error)[:300]
        raise _NotRunError(
            f"{type(model.module).__name__} cannot be run on example_inputs under this policy: {reason}; give inputs "
            "of the shapes, dtypes and device that its forward takes, or another format to the layer that has no "
            "arithmetic in this one",
            reason,
        ) from error


def _written(kind: FileFormat, path: Path, job: Job, expected: list[Tensor] | str) -> Export:
    """The file, held against what the module returns; or not, with the reason, where that cannot be run."""
    try:
        with drafted(path) as draft:
            kind.write(draft, job)
            opened = kind.opened(draft, job)
            check_layers(opened.uses, job.layers, kind.name)
            not_run = expected if isinstance(expected, str) else None
            difference = math.nan if isinstance(expected, str) else _checked(kind, opened, job, expected)
    except OSError as error:
        raise ExportError(
            f"{str(path)!r} cannot be written: {error.strerror or error}; nothing was, so give a path in a folder that "
            "can be written to"
        ) from error
    read = read_layers(opened.uses)
    return Export(path, kind.name, {name: read[name] for name in job.layers if name in read}, difference, not_run)


def _checked(kind: FileFormat, opened: Opened, job: Job, expected: list[Tensor]) -> float:
    """The largest difference from the module's outputs, which is within bounds."""
    found = opened.run()
    check_same_outputs(found, expected, kind.name)
    if opened.is_exact:
        if not are_identical(found, expected):
            raise ExportError(
                f"the {kind.name} file computes otherwise than the module under this policy (largest difference "
                f"{largest_difference(found, expected):.3g}) and was not kept; is there something in forward that "
                "differs from call to call?"
            )
        return largest_difference(found, expected)
    relative = relative_difference(found, expected)
    if relative > CLOSE and relative > (bound := max(CLOSE, ROOM * _rounding(job, expected), last_place(expected))):
        raise ExportError(
            f"the {kind.name} file is {relative:.2g} (relative) off the module under this policy, and {bound:.2g} is "
            "what rounding explains; it was not kept: export to 'pt2', which is exact"
        )
    return largest_difference(found, expected)


def _rounding(job: Job, expected: list[Tensor]) -> float:
    """How far the module under its policy is from itself in fp32: what rounding in other places may change as well."""
    model = job.model
    with model.in_fp32():
        wide = _outputs(model, job.example)
    return relative_difference(expected, wide)
