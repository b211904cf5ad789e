"""The formats of products in a package of AOTInductor, read from the code that was compiled into it.

The package holds its C++ source: a comment before each call of a kernel names the nodes of the program that it
computes, and every buffer is allocated with its dtype.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from lightning_mixprec.deploy.exporting.layer_formats import Use
from lightning_mixprec.deploy.exporting.programs import formats_of

_SOURCES = re.compile(r"// Topologically Sorted Source Nodes: \[([^\]]*)\]")
_ALLOCATED = re.compile(r"cached_torch_dtype_(\w+), .*&(buf\d+)_handle\)")
_REUSED = re.compile(r"(buf\d+) = std::move\((buf\d+)\)")
_KERNEL = re.compile(r"\(aoti_torch_(?:cpu|cuda|xpu)_(\w*(?:mm|conv|attention|linear|rnn)\w*)\((.*)")


def products_in(path: Path, layers: Mapping[str, str]) -> list[Use]:
    """The products that a package's code calls kernels for; those that it computes by loops of its own are not seen.

    Args:
        path: The package.
        layers: By the name of each node of the program that is a product, the layer that it belongs to.
    """
    with zipfile.ZipFile(path) as package:
        codes = [package.read(name).decode() for name in package.namelist() if name.endswith(".cpp")]
    return [use for code in codes for use in _products(code, layers)]


def _products(code: str, layers: Mapping[str, str]) -> Iterator[Use]:
    dtypes: dict[str, torch.dtype] = {}
    node: str | None = None
    for line in code.splitlines():
        if allocated := _ALLOCATED.search(line):
            dtypes[allocated[2]] = getattr(torch, allocated[1])
        if reused := _REUSED.search(line):
            dtypes[reused[1]] = dtypes.get(reused[2], torch.int64)
        if sources := _SOURCES.search(line):
            # A kernel computes the last product that is named: those before it made what it takes.
            node = next((name for name in reversed(sources[1].split(", ")) if name in layers), None)
        if node is not None and (call := _KERNEL.search(line)):
            taken = [dtypes[name] for name in re.findall(r"\bbuf\d+\b", call[2]) if name in dtypes]
            narrow = [dtype for dtype in taken if dtype.itemsize == 1]
            yield Use(layers[node], call[1], True, formats_of(narrow or taken))
            node = None
