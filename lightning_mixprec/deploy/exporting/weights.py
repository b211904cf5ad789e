"""``weights``: the weights alone, each in the format that its layer computes in."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.deploy.exporting.closeness import tensors_of
from lightning_mixprec.deploy.exporting.formatted import bits
from lightning_mixprec.deploy.exporting.layer_formats import Use
from lightning_mixprec.deploy.exporting.protocol import Job, Opened, missing
from lightning_mixprec.errors import ExportError
from lightning_mixprec.numerics.formats import REFERENCE, format_of, get_format

_SAFETENSORS = ".safetensors"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_ROWS = torch.contiguous_format


class Weights:
    """Files that ``load_state_dict`` takes: safetensors where the path says so, else torch's own."""

    name = "weights"

    def check(self, path: Path, job: Job) -> None:
        """Asks for safetensors where it is needed, and for layers whose weights a file can hold.

        Raises:
            ExportError: The suffix is none, the package is missing, or a layer computes in 8 bits.
        """
        if path.suffix not in (_SAFETENSORS, *_TORCH):
            raise ExportError(
                f"weights are to be written to {path.name!r}; end it in {_SAFETENSORS}, or in {', '.join(_TORCH)} for "
                "a file of torch"
            )
        if path.suffix == _SAFETENSORS:
            _safetensors()
        for name, layer in job.layers.items():
            if layer.has_narrow_products:
                raise ExportError(
                    f"layer {name!r} computes in {layer.compute}, whose scales a file of weights has no place for; "
                    f"give it {layer.region} in the policy of the export, or export to 'pt2'"
                )

    def write(self, path: Path, job: Job) -> None:
        """Writes every weight, and buffers as they are."""
        state = weights_of(job)
        if path.suffix != _SAFETENSORS:
            torch.save(state, path)
            return
        if other := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
            raise ExportError(
                f"the module's state has {other!r}, which is no tensor, and safetensors holds tensors alone; write a "
                "torch file (end the path in .pt)"
            )
        # Two names of one tensor are two tensors in such a file, or load_state_dict would miss one of them.
        _safetensors().save_file({name: value.clone(memory_format=_ROWS) for name, value in state.items()}, path)

    def opened(self, path: Path, job: Job) -> Opened:
        """Reads the file as anybody would, and runs the module with its weights in place of its own."""
        if path.suffix == _SAFETENSORS:
            state = _safetensors().load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        own = job.model.module.state_dict()
        if state.keys() != own.keys():
            raise ExportError("the file's names are not those of the module's state_dict, and it was not kept")
        written = {name: value for name, value in weights_of(job).items() if isinstance(value, Tensor)}
        if odd := next((name for name, value in written.items() if not _are_same(value, state[name])), None):
            raise ExportError(f"the file's {odd!r} is not what was written to it, and it was not kept; write it anew")
        uses = [
            Use(_layer_of(name, job), f"weight {name!r}", False, frozenset({format_of(state[name].dtype) or "fp32"}))
            for name, parameter in job.model.module.named_parameters(remove_duplicate=False)
            if parameter.is_floating_point() and isinstance(state.get(name), Tensor)
        ]
        # A layer with two names has one place for a tensor, which functional_call would put back from the second name.
        once = {name for name, _ in job.model.module.named_modules()}
        lent = {
            f"module.{name}": state[name].to(value.device, value.dtype)
            for name, value in own.items()
            if isinstance(value, Tensor) and _holder(name) in once
        }
        return Opened(lambda: _run(job, lent), uses, False)


def weights_of(job: Job) -> dict[str, Any]:
    """A module's ``state_dict`` with each weight in the format that its layer computes in; tied weights are one tensor.

    Layers that share a weight and compute in different formats have it in the narrowest that holds both.
    """
    module = job.model.module
    formats: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if format_of(parameter.dtype) is not None:
            format = job.layers[_layer_of(name, job)].compute
            formats[id(parameter)] = _both(formats.get(id(parameter), format), format)
    cast = {
        id(parameter): parameter.detach().to(get_format(formats[id(parameter)]).dtype)
        for parameter in module.parameters()
        if id(parameter) in formats
    }
    state = module.state_dict(keep_vars=True)
    return {name: cast.get(id(value), _detached(value)) for name, value in state.items()}


def _layer_of(name: str, job: Job) -> str:
    """The layer that a weight belongs to; of one that is computed from others, the nearest that holds it."""
    while name:
        name = name.rpartition(".")[0]
        if name in job.layers:
            return name
    return name


def _both(one: str, two: str) -> str:
    if get_format(one).contains(get_format(two)):
        return one
    return two if get_format(two).contains(get_format(one)) else REFERENCE


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _are_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one.cpu()), bits(other))


def _holder(name: str) -> str:
    """The name of the module that holds a tensor of a ``state_dict``."""
    return name.rpartition(".")[0]


def _run(job: Job, tensors: dict[str, Tensor]) -> list[Tensor]:
    call = torch.func.functional_call
    return tensors_of(call(job.model, tensors, job.example.args, job.example.kwargs, tie_weights=False))


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing("safetensors", "write a torch file (end the path in .pt)") from error
    return safetensors.torch
