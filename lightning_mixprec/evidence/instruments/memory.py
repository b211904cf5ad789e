"""Memory: the bytes that tensors take, those that are free, and errors that say that it ran out."""

import contextlib
import os
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


def agree_on_room(module: nn.Module, device: torch.device) -> None:
    """Raises on all ranks if one has no room for what a replay takes of weights that are sharded."""
    if not is_any_sharded(module):
        return
    sharded = [param for param in module.parameters() if is_sharded(param)]
    needed = 2 * 4 * sum(local_part(param.detach()).numel() for param in sharded) + largest_group_bytes(module)
    free = free_cuda_bytes(device) if device.type == "cuda" else free_host_bytes() // ranks.count()
    if ranks.is_any(needed > free, device):
        raise SupportError(
            "the weights are sharded, and to replay a step each rank needs its part of two sets of gradients and the "
            f"largest group of weights in fp32 ({needed / 2**30:.1f} GiB), which do not fit beside the run; shard the "
            "model in smaller groups (fully_shard of each block)"
        )
