"""``python -m lightning_mixprec.numerics.devices``: what the devices of this machine compute natively, and why."""

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

from lightning_mixprec.numerics.devices.native import native_support
from lightning_mixprec.numerics.formats import FORMATS


def main(args: Sequence[str] | None = None) -> int:
    """Prints a table for each device; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m lightning_mixprec.numerics.devices",
        description="Print which formats the CPU and the GPUs of this machine compute natively, and why.",
    ).parse_args(args)
    print("\n".join(report()))
    return 0


def report() -> Iterator[str]:
    """The lines to print: for each device what it is, and for each format yes or no and the reason."""
    yield f"torch {torch.__version__}"
    capabilities = torch.cpu.get_capabilities()
    cpu = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    yield from _table("cpu", f"{cpu}, threads: {torch.get_num_threads()}")
    if not torch.cuda.is_available():
        yield from ("", "cuda: torch sees no CUDA device")
    for index in range(torch.cuda.device_count()):
        yield from _table(f"cuda:{index}", torch.cuda.get_device_name(index))


def _table(device: str, description: str) -> Iterator[str]:
    parts = {part.name for format in FORMATS.values() for part in format.parts or ()}
    answers = [(name, native_support(name, device)) for name in FORMATS if name not in parts]
    rows = [(name, "yes" if answer.native else "no", answer.reason) for name, answer in answers]
    yield from ("", f"{device}: {description}")
    for name, native, reason in [("format", "native", "reason"), *rows]:
        yield f"  {name:<8}{native:<8}{reason}"


if __name__ == "__main__":
    sys.exit(main())
