"""The last resort where torch does not know a CPU: products in a format are timed against products in fp32.

With arithmetic of its own a CPU takes 0.8 times as long for a product of 128 x 128 matrices (AVX512-BF16), and less for
larger ones. Without, the best kernels convert at each step and take 2.9 times as long (AVX-512 without BF16), torch's
plain ones 20 to 90 times (all on a two-core AMD EPYC). A factor of 1.5 divides the two.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from lightning_mixprec.numerics.devices.support import Support
from lightning_mixprec.numerics.formats import Format

MOST = 1.5
"""The time of a product as a multiple of its time in fp32, up to which a format is taken to be computed natively."""

_CPU = torch.device("cpu")
_SIZE, _GPU_SIZE = 128, 4096
_TRIES = 5


def timed_support(format: Format) -> Support:
    """The support of this machine's CPU for a format, by the time of a product."""
    return judged(format.name, product_cost(format.forward.dtype))


def judged(format: str, cost: float | None) -> Support:
    """What the time of a product says of a format.

    Args:
        format: Its name.
        cost: The time as a multiple of that in fp32; None if there is no such product.

    >>> judged("bf16", 0.53).reason
    'torch does not say what it uses on this CPU, where a product in bf16 took 0.5 times as long as in fp32'
    """
    if cost is None:
        return Support(False, f"torch has no product in {format} on this CPU")
    found = f"a product in {format} took {cost:.1f} times as long as in fp32"
    return Support(cost <= MOST, f"torch does not say what it uses on this CPU, where {found}")


@cache
def product_cost(dtype: torch.dtype, device: torch.device = _CPU) -> float | None:
    """The time of a product as a multiple of its time in fp32, None if torch has none; measured once per process."""
    size = _SIZE if device == _CPU else _GPU_SIZE
    with torch.autocast(device.type, enabled=False):
        try:
            timed, reference = (torch.ones(size, size, dtype=each, device=device) for each in (dtype, torch.float32))
            return time_ratio(partial(_multiplied, timed), partial(_multiplied, reference), timed.device)
        except RuntimeError:
            return None


def time_ratio(timed: Callable[[], object], reference: Callable[[], object], device: torch.device) -> float:
    """The time that one thing takes as a multiple of another's.

    The best of several tries, one in the one and one in the other, so that what else the machine does falls on both. On
    one thread: where the cores are busy, several wait for each other a thousand times as long as they compute.

    Args:
        timed: Does the one thing.
        reference: Does the other.
        device: Where both are done, and waited for.
    """
    of_reference, of_timed = list[float](), list[float]()
    with torch.no_grad(), _one_thread():
        for _ in range(_TRIES + 1):
            of_reference.append(seconds_of(reference, device))
            of_timed.append(seconds_of(timed, device))
    # The first try of each is for kernels to be made.
    return min(of_timed[1:]) / min(of_reference[1:])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _multiplied(matrix: Tensor) -> Tensor:
    return torch._int_mm(matrix, matrix) if matrix.dtype == torch.int8 else torch.mm(matrix, matrix)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The seconds that something takes on a device, by :func:`seconds_at`."""
    start = seconds_at(device)
    run()
    return seconds_at(device) - start


def seconds_at(device: torch.device) -> float:
    """A clock, read when a device has done what it was given.

    On a CPU it counts the seconds that this thread computes, so that what else the machine does is no part of them.
    """
    wait_for(device)
    return time.thread_time() if device.type == "cpu" else time.perf_counter()


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was given; the CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
