"""Where what comes of a run, or of a file, differs from what came of it before."""

import json
import math
import re

import torch

REL, ABS = 0.05, 0.02
"""How far numbers may be off that 16-bit kernels of another CPU compute; losses of these runs are between 0.1 and 2."""


def differences(old, new, is_exact=True, path=""):
    """Where two values of JSON's types, or with tensors, differ; numbers within the tolerance unless all is exact.

    In texts whose numbers were measured, the words count.
    """
    if isinstance(old, float) and type(new) is float:
        same = old == new or (math.isnan(old) and math.isnan(new))
        close = same or (not is_exact and math.isclose(old, new, rel_tol=REL, abs_tol=ABS))
        return [] if close else [f"{path}: {old} -> {new}"]
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [each for key in old for each in differences(old[key], new[key], is_exact, f"{path}.{key}")]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        if path.endswith(".counts") and not is_exact:  # a bin's border may be crossed
            return [] if sum(old) == sum(new) else [f"{path}: {old} -> {new}"]
        pairs = enumerate(zip(old, new, strict=True))
        return [each for place, pair in pairs for each in differences(*pair, is_exact, f"{path}[{place}]")]
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return [] if old.dtype == new.dtype and torch.equal(old, new) else [f"{path}: {old} -> {new}"]
    if isinstance(old, str) and isinstance(new, str) and not is_exact:
        return [] if words(old) == words(new) else [f"{path}: {old} -> {new}"]
    return [] if type(old) is type(new) and old == new else [f"{path}: {old!r} -> {new!r}"]


def words(text):
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text)


def plain(told):
    """As it is read back from a JSON file."""
    return json.loads(json.dumps(told))
