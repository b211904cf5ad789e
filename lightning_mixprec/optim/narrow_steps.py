"""Steps of torch's optimizers on weights and moments that are stored in fewer bits.

The weights of a chunk are put together from what is stored and what is kept, moments likewise, torch's own function
takes its step on these fp32 tensors, and the results are stored again. So the arithmetic is torch's, bit for bit, and
what is widened at one time is a chunk, not a model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.numerics.formats import half_dtypes
from lightning_mixprec.numerics.splitting import rounded_at_random
from lightning_mixprec.optim.kept_moments import SCALES, SMALLEST, blocks_of, dequantized, quantized
from lightning_mixprec.optim.kept_weights import keeping

CHUNK = 1 << 22
"""Numbers that are widened at one time, at most, but for larger tensors; 16 MiB in fp32, and as much per moment."""


@dataclass(frozen=True)
class Moment:
    """A tensor that an optimizer keeps for each parameter.

    Attributes:
        name: Its key in the state.
        is_signed: Whether it has negative numbers.
    """

    name: str
    is_signed: bool


def is_narrow(param: Tensor) -> bool:
    """True of weights stored in 16 bits."""
    return param.dtype in half_dtypes()


def stored_as(param: Tensor, states: str) -> str:
    """The word for how a parameter's moments are stored: those of few numbers are not in 8 bits, nor of fp64 at all."""
    if not is_narrow(param) and param.dtype != torch.float32:
        return "fp32"
    return "fp32" if states == "int8" and local_part(param).numel() < SMALLEST else states


def is_plain(param: Tensor, states: str) -> bool:
    """True of a parameter whose weights and moments are stored as torch has them."""
    return not is_narrow(param) and stored_as(param, states) == "fp32"


def chunks(params: Iterable[Tensor], states: str) -> Iterator[list[Tensor]]:
    """Parameters in lists of one device and dtype, with moments stored in one way, of at most ``CHUNK`` numbers."""
    kinds: dict[Any, list[Tensor]] = {}
    for param in params:
        kind = (local_part(param).device, param.dtype, stored_as(param, states))
        kinds.setdefault(kind, []).append(param)
    for alike in kinds.values():
        chunk: list[Tensor] = []
        size = 0
        for param in alike:
            numel = local_part(param).numel()
            if chunk and size + numel > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(param)
            size += numel
        yield chunk


class Widened:
    """A chunk's weights, gradients and moments in fp32, for one step of torch's function.

    Args:
        params: The parameters of the chunk.
        states: The optimizer's state of each, with everything that belongs to it.
        group: The options of their group.
        moments: The moments to widen.

    Attributes:
        params: fp32 weights; the parameters' own where they are stored so.
        grads: fp32 gradients.
        moments: By name, the fp32 moment of each; the state's own where it is stored so.
        steps: The state's counters of steps.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        group: Mapping[str, Any],
        moments: Sequence[Moment],
    ) -> None:
        self._stored = [local_part(param) for param in params]
        self._states, self._moments = states, moments
        self._keeping = keeping(group["weights"], params[0].dtype) if is_narrow(params[0]) else None
        self._word = stored_as(params[0], group["states"])
        self._flat: dict[str, Tensor] = {}
        self.params = self._stored if self._keeping is None else self._widened_params()
        self.grads = self._widened_grads(params)
        self.moments = {moment.name: self._widened_moment(moment) for moment in moments}
        self.steps = [state["step"] for state in states]

    @property
    def needs_noise(self) -> bool:
        """True if something is rounded at random when it is stored."""
        return self._word == "bf16" or (self._keeping is not None and self._keeping.is_random)

    def store(self, noise: Tensor | None, found_inf: Tensor | None) -> None:
        """Stores weights and moments as they are to be stored.

        Args:
            noise: 64 random bits for each number, if something is rounded at random.
            found_inf: Not 0 if the step was none; then everything stays as it is.
        """
        new: list[tuple[list[Tensor], Tensor]] = []
        if self._keeping is not None:
            stored, kept = self._keeping.narrowed(self._flat["params"], _bits(noise, 0))
            new.append((self._stored, stored))
            if kept is not None:
                new.append((self._parts(str(self._keeping.name)), kept))
        for number, moment in enumerate(self._moments, start=1):
            if self._word == "bf16":
                bits = _bits(noise, number)
                assert bits is not None
                new.append((self._parts(moment.name), rounded_at_random(self._flat[moment.name], torch.bfloat16, bits)))
            elif self._word == "int8":
                for state, each in zip(self._states, self.moments[moment.name], strict=True):
                    codes, scales = quantized(each.reshape(-1), moment.is_signed)
                    new += [([local_part(state[moment.name])], codes), ([state[moment.name + SCALES]], scales)]
        for tensors, values in new:
            _write(tensors, values, found_inf)

    def _widened_params(self) -> list[Tensor]:
        assert self._keeping is not None
        name = self._keeping.name
        kept = None if name is None else _flat(self._parts(name))
        self._flat["params"] = self._keeping.widened(_flat(self._stored), kept)
        return _views(self._flat["params"], self._stored)

    def _widened_grads(self, params: Sequence[Tensor]) -> list[Tensor]:
        grads = [local_part(grad) for param in params if (grad := param.grad) is not None]
        if len({grad.dtype for grad in grads}) > 1:
            return [grad.to(torch.float32) for grad in grads]
        return grads if grads[0].dtype == torch.float32 else _views(_flat(grads).to(torch.float32), grads)

    def _widened_moment(self, moment: Moment) -> list[Tensor]:
        parts = self._parts(moment.name)
        if self._word == "fp32":
            return parts
        if self._word == "bf16":
            self._flat[moment.name] = _flat(parts).to(torch.float32)
            return _views(self._flat[moment.name], parts)
        scales = [state[moment.name + SCALES] for state in self._states]
        return [
            dequantized(codes.reshape(-1), scale, moment.is_signed).view(codes.shape)
            for codes, scale in zip(parts, scales, strict=True)
        ]

    def _parts(self, name: str) -> list[Tensor]:
        return [local_part(state[name]) for state in self._states]


def empty_moment(param: Tensor, moment: Moment, states: str) -> dict[str, Tensor]:
    """The moment of a parameter before its first step, as it is stored."""
    word = stored_as(param, states)
    # What is stored as torch has it is in the weight's own dtype, unless that is one of 16 bits.
    plain = torch.float32 if is_narrow(param) else param.dtype
    dtype = {"fp32": plain, "bf16": torch.bfloat16, "int8": torch.uint8}[word]
    if word != "int8":
        return {moment.name: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}
    zero = quantized(torch.zeros(1, device=local_part(param).device), moment.is_signed)[0]
    scales = torch.zeros(blocks_of(local_part(param).numel()), dtype=torch.float32, device=zero.device)
    return {moment.name: torch.full_like(param, 0, dtype=dtype) + zero.to(dtype), moment.name + SCALES: scales}


def is_kept(state: Mapping[str, Any], param: Tensor, weights: str) -> bool:
    """True if a state has what is to be kept of a parameter in 16 bits."""
    name = keeping(weights, param.dtype).name
    return name is None or name in state


def empty_kept(param: Tensor, weights: str) -> dict[str, Tensor]:
    """What is kept of a parameter in 16 bits that has lost nothing yet."""
    way = keeping(weights, param.dtype)
    if way.name is None:
        return {}
    if way.dtype == torch.float32:
        return {way.name: param.detach().to(torch.float32, copy=True)}
    return {way.name: torch.zeros_like(param, dtype=way.dtype, memory_format=torch.preserve_format)}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _write(tensors: Sequence[Tensor], values: Tensor, found_inf: Tensor | None) -> None:
    if found_inf is not None:
        values = torch.where(found_inf > 0, _flat(tensors), values)
    torch._foreach_copy_(list(tensors), _views(values, tensors))


def _bits(noise: Tensor | None, number: int) -> Tensor | None:
    """16 of the 64 bits, others for each thing that is rounded."""
    return None if noise is None else ((noise >> (48 - 16 * number)) & 0xFFFF).to(torch.int32)
