"""Weights that FSDP2 shards over ranks, and the format in which each group of them is gathered.

``torch.distributed.fsdp.fully_shard`` gathers a module's weights, those of inner modules that are sharded by themselves
excepted, in one message before the module runs. A group whose layers all compute in one 16-bit format, and whose
weights autocast would cast to it anyway, is gathered in it, which halves the message and the memory and changes no
number. Any other group is gathered as it is stored, and autocast casts for each layer. Gradients are reduced in fp32
either way, and inputs are cast by the layers' own formats.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from lightning_mixprec.engine.border_plan import Plan, Site, survey
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import format_of, get_format, half_dtypes
from lightning_mixprec.policy.assignment import LayerPrecision

try:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
except ImportError:  # torch built without distributed
    is_available = False
else:
    is_available = True

_CAST_BY_AUTOCAST: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.MultiheadAttention,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_OWN_WEIGHTS = {"weight", "bias", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"}
_OWN_WEIGHTS |= {"q_proj_weight", "k_proj_weight", "v_proj_weight"}

if is_available:

    @dataclass(frozen=True)
    class _Gathered(MixedPrecisionPolicy):
        """A policy of ours, which may be replaced; the user's own may not.

        Attributes:
            instead_of: What the user had sharded with.
        """

        instead_of: MixedPrecisionPolicy | None = None


class Group(NamedTuple):
    """Weights that are gathered together: a module that leads them, the layers whose they are and their modules."""

    leader: Any
    layers: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def given(self) -> Any:
        """The policy that it is gathered under now."""
        return self.leader._get_fsdp_state()._mp_policy

    @property
    def stored(self) -> set[torch.dtype]:
        """The dtypes that they are stored in; FSDP2 takes one."""
        return {weight.dtype for module in self.modules for weight in _weights(module)}

    def format(self, assignment: Mapping[str, LayerPrecision]) -> torch.dtype | None:
        """The dtype that they are gathered in; None for as they are stored."""
        formats = {_format(module, assignment[name]) for name, module in zip(self.layers, self.modules, strict=True)}
        return formats.pop() if len(formats) == 1 else None


class _Kind(NamedTuple):
    """What weights of one group have in common: the 16-bit formats they are gathered in, and stored in by a rule."""

    gathered: torch.dtype | None
    stored: torch.dtype | None


def shard(
    model: nn.Module,
    modules: Iterable[nn.Module],
    assignment: Mapping[str, LayerPrecision],
    *,
    apart: bool = True,
    **options: Any,
) -> None:
    """Shards modules of a model as torch's ``fully_shard``, the inner ones first; those that are sharded are left.

    Layers of a module that are to be gathered or stored in another format than most of it (norms, or what computes in
    fp32) become a group of their own, which is gathered when the first of them is called.

    Args:
        model: The model.
        modules: Modules below it.
        assignment: What each of its layers is assigned.
        apart: Whether they do; not where something reads the weights of a layer without calling it (a fused loss).
        options: What ``fully_shard`` takes beside ``mp_policy``: mesh, reshard_after_forward, offload_policy, ...

    Raises:
        PolicyError: A module is not one of the model's.
    """
    sites = survey(model)
    depth = {id(module): name.count(".") + bool(name) for name, module in model.named_modules()}
    chosen = list(modules)
    for module in chosen:
        if id(module) not in depth:
            raise PolicyError(
                f"a {type(module).__name__} was to be sharded that is no module of the {type(model).__name__}; pass "
                "modules that are registered in it"
            )
    formats = {id(part): _kind(part, assignment[site.name]) for site in sites for part in site.parts}
    called = {id(site.module) for site in sites} if apart else set()
    for module in sorted(chosen, key=lambda module: -depth[id(module)]):
        if not isinstance(module, FSDPModule):
            groups, rest = _divided(module, formats, called)
            for kind, parts in groups.items():
                fully_shard(parts, mp_policy=_policy(kind.gathered), **options)
            fully_shard(module, mp_policy=_policy(rest), **options)


def gathered_first(plan: Plan, model: nn.Module) -> Plan:
    """The plan in which a border swaps those weights alone that are gathered by then.

    Weights of an inner module that is sharded by itself are gathered as that is called, whose own border swaps them.
    """
    states = [(id(leader._get_fsdp_state()), leader) for leader in leaders_of(model)]
    leader_of = {id(each): state for state, leader in states for each in _own_modules(leader)}
    if not leader_of:
        return plan
    crossings = {}
    for site, crossing in plan.crossings.items():
        here = (None, leader_of.get(id(site.module)))
        slots = tuple(slot for slot in crossing.slots if leader_of.get(id(slot.module)) in here)
        crossings[site] = crossing._replace(slots=slots)
    return plan._replace(crossings=crossings)


def groups_of(sites: Sequence[Site]) -> list[Group]:
    """The groups of weights that FSDP2 gathers in a model."""
    leaders = leaders_of(sites[0].module)
    leader_of = {id(each): leader for leader in leaders for each in _own_modules(leader)}
    found: dict[int, list[tuple[Any, str, nn.Module]]] = {}
    for site in sites:
        for part in site.parts:
            if id(part) in leader_of and _weights(part):
                leader = leader_of[id(part)]
                found.setdefault(id(leader._get_fsdp_state()), []).append((leader, site.name, part))
    return [Group(each[0][0], *map(tuple, list(zip(*each, strict=True))[1:])) for each in found.values()]


def gather(groups: Sequence[Group], assignment: Mapping[str, LayerPrecision]) -> None:
    """Has groups gathered in the formats of an assignment, between steps.

    Raises:
        PolicyError: The user sharded a group with a format of his own, and a layer of it computes in another; nothing
            has changed.
    """
    for group in groups:
        if not _is_ours(group.given):
            _check_given(group, assignment)
    for group in groups:
        wanted, given = _policy(group.format(assignment), group.stored), group.given
        if _is_ours(given) and (given.param_dtype, given.reduce_dtype) != (wanted.param_dtype, wanted.reduce_dtype):
            _replace(group.leader, replace(wanted, instead_of=getattr(given, "instead_of", given)))


def release(groups: Iterable[Group]) -> None:
    """Has groups gathered as they were before, or as they are stored if they were sharded by :func:`shard`."""
    for group in groups:
        if isinstance(group.given, _Gathered):
            _replace(group.leader, group.given.instead_of or _policy(None))


def check_stored(groups: Iterable[Group], asked: Mapping[int, torch.dtype | None]) -> None:
    """Raises unless the weights of each group are to be stored in one format.

    Args:
        groups: The groups.
        asked: By the ``id`` of a module the dtype that its weights are to be stored in; None for as they are.

    Raises:
        PolicyError: They are not; FSDP2 gathers what is of one dtype.
    """
    for group in groups:
        first: dict[torch.dtype, str] = {}
        for name, module in zip(group.layers, group.modules, strict=True):
            for weight in filter(attrgetter("requires_grad"), _weights(module)):
                first.setdefault(asked.get(id(module)) or weight.dtype, name)
        if len(first) > 1:
            told = " and ".join(f"{name!r} in {format_of(dtype)}" for dtype, name in first.items())
            raise PolicyError(
                f"FSDP2 gathers weights of one stored format together, and a group is to store {told}; shard with "
                "plugin.fully_shard in configure_model, which makes groups of one format each, or give them one"
            )


def take_stored(groups: Iterable[Group]) -> None:
    """Has FSDP2 gather weights as they are stored now, after they were stored otherwise; between steps."""
    for group in groups:
        group.leader.reshard()
        for each in param_groups(group.leader._get_fsdp_state()):
            for param in each.fsdp_params:
                param.reset_sharded_param()
        _replace(group.leader, group.given)


def reshard(model: nn.Module) -> None:
    """Lets go of weights that are still gathered, as those of the outermost module are after an evaluation."""
    for leader in leaders_of(model):
        leader.reshard()


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """FSDP2 stands aside: modules run on whatever weights they hold, and nothing is gathered or freed."""
    both = [hooks for leader in leaders_of(model) for hooks in (leader._forward_pre_hooks, leader._forward_hooks)]
    kept = [(hooks, dict(hooks)) for hooks in both]
    for hooks, before in kept:
        for key, hook in before.items():
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


def is_sharded(tensor: torch.Tensor) -> bool:
    """True if a tensor is spread over ranks (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def may_be_sharded() -> bool:
    """False in a process that belongs to no group of ranks: nothing is sharded there, and nobody has to look."""
    return distributed.is_available() and distributed.is_initialized()


def is_any_sharded(model: nn.Module) -> bool:
    """True if ranks hold parts of a model's weights, so that they have to act together."""
    return may_be_sharded() and any(map(is_sharded, model.parameters()))


def as_whole(tensor: Any) -> Any:
    """A tensor that is spread over ranks (a DTensor), whole on each, which takes a message; any other one itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def added_up(gradient: Any) -> Any:
    """A gradient of which ranks hold summands, summed over them, which takes a message; any other one itself."""
    from torch.distributed.tensor import Replicate

    if not any(each.is_partial() for each in getattr(gradient, "placements", ())):
        return gradient
    return gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in gradient.placements])


def held_by_earlier_rank(model: nn.Module) -> set[str]:
    """Names of weights that count elsewhere: tensor parallelism splits others over ranks, and keeps these on each.

    Ranks that split layers take the same batch, so that what they hold whole has the same gradient on all of them, of
    which that of the first one counts. Empty without tensor parallelism.
    """
    if not is_any_sharded(model):
        return set()
    named = [(name, _ranks_of(param)) for name, param in model.named_parameters()]
    sharding = {rank for leader in leaders_of(model) for rank in _sharded_over(leader)}
    me = distributed.get_rank()
    splitting = {me}.union(*(group for _, over in named for group in over if not group & sharding - {me}))
    if me == min(splitting):
        return set()
    return {name for name, over in named if not any(group & splitting - {me} for group in over)}


def leaders_of(model: nn.Module) -> list[Any]:
    """The modules that were sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)] if is_available else []


def _ranks_of(param: Any) -> list[set[int]]:
    """The ranks over which a weight is spread, by dimension of its mesh; none for a plain tensor."""
    if not is_sharded(param):
        return []
    mesh = param.device_mesh
    return [set(distributed.get_process_group_ranks(mesh.get_group(place))) for place in range(mesh.ndim)]


def _sharded_over(leader: Any) -> list[int]:
    """The ranks over which FSDP2 shards a module, those that hold copies included."""
    meshes = [group.mesh_info.mesh for group in param_groups(leader._get_fsdp_state())]
    return [rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()]


def _own_modules(leader: nn.Module) -> Iterator[nn.Module]:
    """A module and those below it, without those that are sharded by themselves and what is below them."""
    yield leader
    for child in leader.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _divided(
    module: nn.Module, formats: Mapping[int, _Kind], called: Set[int]
) -> tuple[dict[_Kind, list[nn.Module]], torch.dtype | None]:
    """A module's layers that are gathered apart, by format, and the format in which the others are.

    Layers that are not called, hold other layers, or share a weight with another one, stay with the others.
    """
    parts = [part for part in _own_modules(module) if _weights(part)]
    uses = Counter(id(weight) for part in parts for weight in _weights(part))
    apart: dict[_Kind, list[nn.Module]] = {}
    stay: set[_Kind] = set()
    for part in parts:
        is_alone = (
            part is not module
            and id(part) in called
            and not any(_weights(each) for each in part.modules() if each is not part)
        )
        if is_alone and all(uses[id(weight)] == 1 for weight in _weights(part)):
            apart.setdefault(formats[id(part)], []).append(part)
        else:
            stay.add(formats[id(part)])
    if not stay and apart:
        stay = {max(apart, key=lambda kind: sum(each.numel() for part in apart[kind] for each in _weights(part)))}
    rest = stay.pop() if len(stay) == 1 else None
    if rest is not None:
        apart.pop(rest, None)
    return apart, rest.gathered if rest is not None else None


def _kind(module: nn.Module, precision: LayerPrecision) -> _Kind:
    stored = _half_dtype(precision.param) if precision.is_stored_by_rule else None
    return _Kind(_format(module, precision), stored)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return [param for param in module._parameters.values() if param is not None]


def _format(module: nn.Module, precision: LayerPrecision) -> torch.dtype | None:
    """The 16-bit format that autocast casts all weights of a module to, if it does."""
    names = {name for name, param in module._parameters.items() if param is not None}
    is_cast = names <= _OWN_WEIGHTS and any(type(module).forward is kind.forward for kind in _CAST_BY_AUTOCAST)
    return _half_dtype(precision.region) if is_cast else None


def _half_dtype(format: str) -> torch.dtype | None:
    described = get_format(format)
    return described.forward.dtype if described.is_half else None


def _is_ours(given: Any) -> bool:
    """True if a policy may be replaced: the user has said nothing with it."""
    return isinstance(given, _Gathered) or given == MixedPrecisionPolicy()


def _check_given(group: Group, assignment: Mapping[str, LayerPrecision]) -> None:
    gathered = group.given.param_dtype
    for name in group.layers if gathered is not None else ():
        if _half_dtype(assignment[name].region) != gathered:
            raise PolicyError(
                f"the weights of layer {name!r} were sharded with MixedPrecisionPolicy(param_dtype={gathered}), but it "
                f"is to compute in {assignment[name].compute}; leave mp_policy out of fully_shard, or call "
                "plugin.fully_shard in configure_model"
            )


def _policy(dtype: torch.dtype | None, stored: Set[torch.dtype] = frozenset()) -> Any:
    is_half = dtype is not None or not stored.isdisjoint(half_dtypes())
    return _Gathered(dtype, torch.float32 if is_half else None, cast_forward_inputs=False)


def _replace(leader: Any, policy: Any) -> None:
    """Gives a group another policy. torch has no public way; what was allocated for the old format is dropped."""
    leader.reshard()
    state = leader._get_fsdp_state()
    state._mp_policy = policy
    for group in param_groups(state):
        group.mp_policy = policy
        for param in group.fsdp_params:
            param.mp_policy = policy
            param.all_gather_outputs = []
            held = vars(param).pop("_unsharded_param", None)
            if held is not None and held.grad is not None and param.unsharded_accumulated_grad is None:
                param.unsharded_accumulated_grad = held.grad  # of batches whose gradients are not reduced yet
        if state._is_root is not None:
            group._init_mp_dtypes()


def param_groups(state: Any) -> list[Any]:
    """One in older torch, any number in newer."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
