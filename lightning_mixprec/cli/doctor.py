"""Versions, devices and extras of this installation, as ``mixprec doctor`` prints them for a bug report."""

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.numerics.devices.timing import product_cost
from lightning_mixprec.numerics.formats import FORMATS, compute_formats
from lightning_mixprec.policy.table import align

_PACKAGE = "lightning_mixprec"
_SHOWN = (_PACKAGE, "torch", "lightning", "pytorch_lightning", "torchmetrics", "torchao", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")
_REQUIREMENT = re.compile(r"""^([A-Za-z0-9][\w.-]*)(?:\[([\w,\s-]+)\])?.*?;.*extra\s*==\s*["']([\w-]+)["']""")


def examine() -> tuple[list[str], list[str]]:
    """The lines to print, and what is wrong with the installation, a line each."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    lines = [*_versions()]
    for device in devices:
        lines += ["", *_device(device)]
    if len(devices) == 1:
        lines += ["", "cuda: torch sees no CUDA device"]
    lines += ["", *_extras()]
    return lines, list(_findings())


def missing_of_extras() -> dict[str, list[str]]:
    """By extra the distributions that it would install and that are not there."""
    missing: dict[str, list[str]] = {}
    for requirement in metadata.requires(_PACKAGE) or ():
        if (found := _REQUIREMENT.match(requirement)) is None:
            continue
        name, extras, extra = found.groups()
        missing.setdefault(extra, [])
        if name.replace("-", "_") == _PACKAGE:
            missing[extra] += [each for part in extras.split(",") for each in missing.get(part.strip(), ())]
        elif _version(name) is None:
            missing[extra].append(name)
    return missing


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    for name in _SHOWN:
        if (version := _version(name)) is not None:
            yield f"{name} {version}"


def _device(device: str) -> Iterator[str]:
    """A table of what a device computes natively, and how long a product takes."""
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else _cpu()
    yield f"{device}: {name}"
    rows = [("format", "native", "a product's time, fp32 = 1", "reason")]
    for format in compute_formats():
        support = native_support(format, device)
        cost = product_cost(FORMATS[format].forward.dtype, place)
        rows.append((format, "yes" if support.native else "no", f"{cost:.2g}" if cost else "-", support.reason))
    yield from (f"  {line}" for line in align(rows, right=rows[0][2:3]))


def _cpu() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def _extras() -> Iterator[str]:
    for extra, missing in missing_of_extras().items():
        if missing:
            yield f'extra {extra}: {", ".join(missing)} missing (pip install "{_PACKAGE}[{extra}]")'
        else:
            yield f"extra {extra}: complete"


def _findings() -> Iterator[str]:
    if _DRIVER.is_file() and not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        yield f"this machine has an NVIDIA driver, but torch, which {build}, sees no device"
    problems = metadata.requires(_PACKAGE) or ()
    for requirement in (each for each in problems if ";" not in each):
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if _version(name) is None:
            yield f"{requirement} is required and not installed"


def _version(name: str) -> str | None:
    try:
        return torch.__version__ if name == "torch" else metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
