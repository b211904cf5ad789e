"""Small results on their way from the device to the host, without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Transfer:
    """Copies of tensors that arrive on the host in the background.

    Args:
        tensors: Small tensors, on the CPU or on one device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        cuda = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
        self._arrived: torch.cuda.Event | None = None
        self._values = [_to_host(tensor.detach()) for tensor in tensors]
        if cuda is not None:
            self._arrived = torch.cuda.Event(blocking=True)  # else a core spins until it has come
            self._arrived.record(torch.cuda.current_stream(cuda))

    @property
    def is_ready(self) -> bool:
        """True if :meth:`get` returns at once."""
        return self._arrived is None or self._arrived.query()

    def get(self) -> list[Tensor]:
        """The tensors on the CPU. Waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
