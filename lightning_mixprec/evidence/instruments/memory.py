"""Memory: the bytes that tensors take, those that are free, and errors that say that it ran out."""

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mixprec import ranks
from lightning_mixprec.engine.lent_shards import largest_group_bytes
from lightning_mixprec.engine.sharding import is_any_sharded, is_sharded
from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.flat_batches import local_part


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values, and of the indices of a sparse one; of a DTensor this rank's part."""
    tensor = local_part(tensor)
    if tensor.layout == torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    return tensor.nbytes if tensor.layout == torch.strided else tensor.values().nbytes * 2


def is_out_of_memory(error: Exception) -> bool:
    """True for an error that says that memory ran out, on a GPU or on the CPU."""
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said)


def free_cuda_bytes(device: torch.device) -> int:
    """Memory that a GPU can give: what is nobody's, and what torch has taken from it and does not use."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_bytes() -> int:
    """Memory that this machine can give; 0 where it does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    names = getattr(os, "sysconf_names", {})
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in names else 0


def agree_on_room(module: nn.Module, device: torch.device, kept: Collection[str] | None = None) -> None:
    """Raises on all ranks if one has no room for what a replay takes of weights that are sharded.

    Args:
        module: What is replayed.
        device: The device it is on.
        kept: The names of the parameters whose gradients are kept; None for all.
    """
    if not is_any_sharded(module):
        return
    needed = _bytes_of_two_gradients(module, kept) + largest_group_bytes(module)
    if ranks.is_any(needed > _free_bytes(device), device):
        raise SupportError(
            "the weights are sharded, and to replay a step each rank needs its part of two sets of gradients and the "
            f"largest group of weights in fp32 ({needed / 2**30:.1f} GiB), which do not fit beside the run; shard the "
            "model in smaller groups (fully_shard of each block)"
        )


def parts_with_room(
    module: nn.Module, device: torch.device, owned: Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """Layers in parts, of each of which two sets of gradients fit beside a replay; all in one where weights are whole.

    The same on all ranks, which ask together where weights are sharded. A layer that does not fit is a part by itself.

    Args:
        module: What is replayed.
        device: The device it is on.
        owned: Names of parameters by layer.
    """
    if not is_any_sharded(module):
        return [tuple(owned)]
    room = _free_bytes(device) - largest_group_bytes(module)
    needed = _bytes_of_two_gradients(module, {name for names in owned.values() for name in names})
    lacking = torch.tensor(1 - max(room, 0) / max(needed, 1), dtype=torch.float64, device=device)
    ranks.take_largest([lacking])
    params = dict(module.named_parameters())
    sizes = {layer: sum(params[name].numel() for name in names) for layer, names in owned.items()}
    most = sum(sizes.values()) * (1 - max(lacking.item(), 0.0))
    parts: list[list[str]] = []
    left = 0.0
    for layer, size in sizes.items():
        if size > left or not parts:
            parts.append([])
            left = most
        parts[-1].append(layer)
        left -= size
    return [tuple(part) for part in parts]


def _bytes_of_two_gradients(module: nn.Module, kept: Collection[str] | None) -> int:
    """What this rank holds, in fp32, of two sets of gradients of weights that are sharded."""
    named = module.named_parameters()
    sharded = (param for name, param in named if is_sharded(param) and (kept is None or name in kept))
    return 2 * 4 * sum(local_part(param.detach()).numel() for param in sharded)


def _free_bytes(device: torch.device) -> int:
    """Memory that this rank can take."""
    return free_cuda_bytes(device) if device.type == "cuda" else free_host_bytes() // ranks.count()
