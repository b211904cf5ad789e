"""Steps of torch's optimizers on weights and moments that are stored in fewer bits.

The weights of a chunk are put together from what is stored and what is kept, moments likewise, torch's own function
takes its step on these fp32 tensors, and the results are stored again. So the arithmetic is torch's, bit for bit, and
what is widened at one time is a chunk, not a model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.numerics.splitting import rounded_at_random
from lightning_mixprec.optim.kept_moments import SCALES, Moment, dequantized, quantized, stored_as
from lightning_mixprec.optim.kept_weights import Keeping, is_narrow, keeping
from lightning_mixprec.optim.pieces import Part, divided, joined


class Widened:
    """A chunk's weights, gradients and moments in fp32, for one step of torch's function.

    Args:
        parts: The parts of parameters that make the chunk.
        states: The optimizer's state of the parameter of each, with everything that belongs to it.
        group: The options of their group.
        moments: The moments to widen.

    Attributes:
        params: fp32 weights; the parameters' own where they are stored so.
        grads: fp32 gradients.
        moments: By name, the fp32 moment of each; the state's own where it is stored so.
        steps: The counters of steps: the state's for the last part of a parameter, copies for those before it.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        states: Sequence[dict[str, Any]],
        group: Mapping[str, Any],
        moments: Sequence[Moment],
    ) -> None:
        param = parts[0].param
        self._parts, self._states, self._moments = parts, states, moments
        self._stored = [part.of(part.param) for part in parts]
        self._keeping = keeping(group["weights"], param.dtype) if is_narrow(param) else None
        self._word = stored_as(param, group["states"])
        self._flat: dict[str, Tensor] = {}  # what was widened, as joined lays it
        self.params = self._stored if self._keeping is None else self._widened_params(self._keeping)
        self.grads = self._widened_grads()
        self.moments = {moment.name: self._widened_moment(moment) for moment in moments}
        steps = [state["step"] for state in states]
        self.steps = [step if part.is_last else step.clone() for part, step in zip(parts, steps, strict=True)]

    @property
    def needs_noise(self) -> bool:
        """True if something is rounded at random when it is stored."""
        return self._word == "bf16" or (self._keeping is not None and self._keeping.is_random)

    def store(self, noise: Tensor | None, found_inf: Tensor | None) -> None:
        """Stores weights and moments as they are to be stored.

        Args:
            noise: 64 random bits for each number, as :func:`joined` lays them, if something is rounded at random.
            found_inf: Not 0 if the step was none; then everything stays as it is.
        """
        if self._keeping is not None:
            self._store_params(self._keeping, noise, found_inf)
        for number, moment in enumerate(self._moments, start=1):
            if self._word == "bf16":
                assert noise is not None
                new = rounded_at_random(self._flat[moment.name], torch.bfloat16, _bits(noise, number))
                _write(self._state(moment.name), new, found_inf)
            elif self._word == "int8":
                self._store_codes(moment, found_inf)

    def _widened_params(self, way: Keeping) -> list[Tensor]:
        kept = [joined(self._state(key)) for key in way.dtypes]
        self._flat["params"] = way.widened(joined(self._stored), kept)
        return divided(self._flat["params"], self._stored)

    def _store_params(self, way: Keeping, noise: Tensor | None, found_inf: Tensor | None) -> None:
        stored, kept = way.narrowed(self._flat["params"], None if noise is None else _bits(noise, 0))
        _write(self._stored, stored, found_inf)
        for key, value in zip(way.dtypes, kept, strict=True):
            _write(self._state(key), value, found_inf)

    def _widened_grads(self) -> list[Tensor]:
        grads = [part.of(part.param.grad) for part in self._parts if part.param.grad is not None]
        dtypes = {grad.dtype for grad in grads}
        if len(dtypes) > 1:
            return [grad.to(torch.float32) for grad in grads]
        if dtypes == {torch.float32}:
            return grads
        return divided(joined(grads).to(torch.float32), grads)

    def _widened_moment(self, moment: Moment) -> list[Tensor]:
        stored = self._state(moment.name)
        if self._word == "fp32":
            return stored
        if self._word == "bf16":
            self._flat[moment.name] = joined(stored).to(torch.float32)
            return divided(self._flat[moment.name], stored)
        return [
            dequantized(codes.reshape(-1), scales, moment.is_signed).view(codes.shape)
            for codes, scales in zip(stored, self._scales(moment), strict=True)
        ]

    def _store_codes(self, moment: Moment, found_inf: Tensor | None) -> None:
        stored = zip(self._state(moment.name), self._scales(moment), self.moments[moment.name], strict=True)
        for codes, scales, wide in stored:
            new_codes, new_scales = quantized(wide.reshape(-1), moment.is_signed)
            codes.copy_(_unless(found_inf, codes, new_codes.view(codes.shape)))
            scales.copy_(_unless(found_inf, scales, new_scales))

    def _state(self, name: str) -> list[Tensor]:
        return [part.of(state[name]) for part, state in zip(self._parts, self._states, strict=True)]

    def _scales(self, moment: Moment) -> list[Tensor]:
        pairs = zip(self._parts, self._states, strict=True)
        return [part.of_scales(state[moment.name + SCALES]) for part, state in pairs]


def _write(tensors: Sequence[Tensor], flat: Tensor, found_inf: Tensor | None) -> None:
    if found_inf is not None:
        flat = _unless(found_inf, joined(tensors), flat)
    torch._foreach_copy_(list(tensors), divided(flat, tensors))


def _unless(found_inf: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if found_inf is None else torch.where(found_inf > 0, old, new)


def _bits(noise: Tensor, number: int) -> Tensor:
    """16 of the 64 bits, others for each thing that is rounded."""
    return ((noise >> (48 - 16 * number)) & 0xFFFF).to(torch.int32)
