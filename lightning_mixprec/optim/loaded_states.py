"""A loaded state of one parameter, brought into the storage that is configured now; and weights with all their bits."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.optim.gradients import params_of
from lightning_mixprec.optim.kept_moments import SCALES, Moment, dequantized, empty_moment, quantized, stored_as
from lightning_mixprec.optim.kept_weights import KEPT, Keeping, empty_kept, is_narrow, keeping, keeping_in


def as_configured(
    param: Tensor,
    state: dict[str, Any],
    saved: Mapping[str, Any],
    group: Mapping[str, Any],
    moments: Sequence[Moment],
) -> list[str]:
    """Stores what a state has as a group is configured to, and gives the weight the bits that it keeps of it.

    Torch has cast every tensor of the state to the weight's dtype, which destroys what is no number of that dtype; so
    the saved ones are taken.

    Args:
        param: The parameter, loaded.
        state: Its state, as torch has loaded it; changed in place.
        saved: Its state as it was saved.
        group: The options of its group.
        moments: The moments that it may have.

    Returns:
        What lost bits, in words.
    """
    lost = []
    for moment in moments:
        if isinstance(saved.get(moment.name), Tensor):
            state.pop(moment.name + SCALES, None)
            before = _Saved(saved[moment.name], saved.get(moment.name + SCALES))
            state.update(_stored_moment(param, moment, before, group["states"]))
            lost += _lost_by(moment, before, state)
    for key in KEPT & state.keys():
        del state[key]
    if keeping_in(saved):
        lost += _restore_weight(param, state, saved, group["weights"])
    elif is_narrow(param):
        state.update(empty_kept(param, group["weights"]))
    return lost


def store_weight(param: Tensor, state: dict[str, Any], wide: Tensor, weights: str) -> None:
    """Stores an fp32 value in a weight of 16 bits and what it cannot hold in the state; at random nothing is rounded.

    Args:
        param: The weight; of a DTensor the part of this rank is meant, here and in ``wide``.
        state: Its state in the optimizer.
        wide: The value, fp32.
        weights: The word for what keeps the bits.
    """
    way = keeping(weights, param.dtype)
    stored, kept = (wide.to(param.dtype), ()) if way.is_random else way.narrowed(wide, None)
    with torch.no_grad():
        local_part(param).copy_(stored)
    state.update(empty_kept(param, weights))
    for key, value in zip(way.dtypes, kept, strict=True):
        local_part(state[key]).copy_(value)


def give_bits(param: Tensor, state: dict[str, Any]) -> None:
    """Gives a weight that is stored in fp32 now the bits that its state keeps, which keeps them no longer."""
    kept = {key: state.pop(key) for key in KEPT & state.keys()}
    if keeping_in(kept):
        _restore_weight(param, state, kept, "exact")


def fp32_state_dict(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> dict[str, Any]:
    """The model's state_dict with all bits of the weights that are stored in 16 bits, those in fp32; nothing is shared.

    Args:
        model: The model.
        optimizer: The optimizer of its weights, or several; weights that none of them has are cast.

    Raises:
        SupportError: The optimizers have weights in 16 bits, and none of the model's; or there is no module or no
            optimizer.

    >>> from lightning_mixprec.optim import AdamW
    >>> model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    >>> _ = nn.init.ones_(model.weight)
    >>> optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    >>> model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    >>> optimizer.step()
    >>> model.weight.item(), round(fp32_state_dict(model, optimizer)["weight"].item(), 6)
    (1.0, 0.9999)
    """
    optimizers = _checked(model, optimizer)
    states = {id(param): each.state.get(param, {}) for each in optimizers for param in params_of(each)}
    _check_whose([param for each in optimizers for param in params_of(each)], model)
    full = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in full and is_narrow(param):
            wide = torch.empty_like(full[name], dtype=torch.float32)
            local_part(wide).copy_(widened(param, states.get(id(param), {})))
            full[name] = wide
    return full


def _checked(model: object, optimizer: object) -> list[Optimizer]:
    several = optimizer if isinstance(optimizer, Iterable) else [optimizer]
    found = [each for each in several if isinstance(each, Optimizer)]
    if not isinstance(model, nn.Module) or found != list(several):
        raise SupportError(
            f"fp32_state_dict was given a {type(model).__name__} and a {type(optimizer).__name__}; give a module, and "
            "its optimizer or a list of them"
        )
    return found


def _check_whose(params: Sequence[Tensor], model: nn.Module) -> None:
    own, narrow = {id(param) for param in model.parameters()}, list(filter(is_narrow, params))
    if narrow and not any(id(param) in own for param in narrow):
        raise SupportError(
            f"the optimizer has {len(narrow)} weights in 16 bits, and none of them is a weight of this "
            f"{type(model).__name__}; give the model that it trains, not a copy"
        )


def widened(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """A weight in 16 bits, in fp32 with all bits that a state keeps of it; of a DTensor the part of this rank."""
    stored = local_part(param.detach())
    found = keeping_in(state)
    if found is None or found[1] != param.dtype:
        return stored.to(torch.float32)
    return _full(found[0], stored, [local_part(state[key]) for key in found[0].dtypes])


def _full(way: Keeping, stored: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """A weight with all its bits. One stored as 0 is 0: pruning wrote that, or what it lost is less than 2**-133."""
    wide = way.widened(stored, kept)
    return wide if "master" in way.dtypes else torch.where(stored == 0, stored.to(torch.float32), wide)


def _restore_weight(param: Tensor, state: dict[str, Any], saved: Mapping[str, Any], weights: str) -> list[str]:
    """Gives a weight, or its state, the bits that a saved state keeps of it; what lost bits, in words."""
    found = keeping_in(saved)
    assert found is not None
    was, dtype = found
    kept = {key: saved[key].to(param.device) for key in was.dtypes}
    if param.dtype == dtype and keeping(weights, dtype) == was:
        state.update({key: value.clone() for key, value in kept.items()})
        return []
    stored, beside = local_part(param.detach()), [local_part(value) for value in kept.values()]
    if "master" in kept:  # which needs no bit of the weight, unless somebody else wrote that
        wide = torch.where(beside[0].to(dtype).to(stored.dtype) == stored, beside[0], stored.to(torch.float32))
    else:
        wide = _full(was, stored.to(dtype), beside)
    if is_narrow(param):
        store_weight(param, state, wide, weights)
        exact = torch.equal(widened(param, state), wide)
        return [] if exact else [f"weights, of which weights={weights!r} keeps {_BITS_KEPT[weights]}"]
    with torch.no_grad():
        local_part(param).copy_(wide)
    return []


_BITS_KEPT = {
    "exact": "all 32 bits",
    "kahan": "two numbers of the weight's own 16 bits",
    "stochastic": "the weight's own 16 bits",
    "nearest": "the weight's own 16 bits",
}


class _Saved(NamedTuple):
    """A moment as it was saved."""

    values: Tensor
    scales: Tensor | None


def _lost_by(moment: Moment, saved: _Saved, state: Mapping[str, Any]) -> list[str]:
    """What a moment loses that is stored in fewer bits than it was, in words."""
    before, now = (8 * values.element_size() for values in (saved.values, state[moment.name]))
    return [f"{moment.name} from {before} to {now} bits a number"] if now < before else []


def _stored_moment(param: Tensor, moment: Moment, saved: _Saved, states: str) -> dict[str, Tensor]:
    """A moment as a group stores it, of one that may have been stored otherwise."""
    device = local_part(param).device
    word = stored_as(param, states)
    new = empty_moment(param, moment, states)
    values = local_part(new[moment.name])
    source = local_part(saved.values).to(device)
    if saved.scales is not None and word == "int8":
        values.copy_(source)
        new[moment.name + SCALES].copy_(saved.scales)
        return new
    if saved.scales is not None:
        source = dequantized(source.reshape(-1), saved.scales.to(device), moment.is_signed).view(values.shape)
    if word == "int8":
        codes, scales = quantized(source.to(torch.float32).reshape(-1), moment.is_signed)
        values.copy_(codes.view(values.shape))
        new[moment.name + SCALES].copy_(scales)
    else:
        values.copy_(source)
    return new
