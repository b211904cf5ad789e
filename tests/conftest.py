"""What every test starts from: fixed seeds, a working directory of its own, a quiet Lightning."""

import logging
import os
import random
import sys
from functools import cache

import numpy as np
import pytest
import torch
from attaching import attached, snapshot  # noqa: F401
from capabilities import incapable
from hypothesis import settings
from version_table import record

# Shared machines are slow at times, and a failure must come back on the next run.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.register_profile("quick", settings.get_profile("suite"), max_examples=30)
settings.load_profile("suite")

# Tensors are tiny here, and threads that wait for busy cores cost more than they compute.
torch.set_num_threads(1)
# Runs are compared to the last bit, and some of cuDNN's gradients add up in any order.
torch.backends.cudnn.deterministic = True
os.environ["OMP_NUM_THREADS"] = "1"  # without it Lightning's DDP sets as many as there are cores, for all later tests


def pytest_configure(config):
    """A slow test that is asked for by its name is run; where slow ones are not, hypothesis draws fewer examples."""
    if config.option.markexpr == "not slow" and any("::" in argument for argument in config.args):
        config.option.markexpr = ""
    if config.option.markexpr == "not slow":
        settings.load_profile("quick")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """All tests take up to four cores; a part that is asked for by its path does so with ``-n logical``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_all = config.args_source is config.ArgsSource.TESTPATHS or config.option.numprocesses == "logical"
    return min(cores, 4) if is_all and cores > 1 else 0


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA device, and torch {torch.__version__} sees none on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """Records with which versions how many tests passed, if MIXPREC_RECORD says where."""
    if path := os.environ.get("MIXPREC_RECORD"):
        record(path, {kind: len(reports) for kind, reports in terminalreporter.stats.items()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """A test that meets what this machine cannot compute is skipped, by what torch says and not by its name."""
    try:
        return (yield)
    except Exception as error:
        if reason := incapable(error):
            pytest.skip(reason)
        raise


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _determinism_as_before():
    """``Trainer(deterministic=True)`` sets it for the process, and the next test in it may need what is not."""
    mode = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(autouse=True)
def _own_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _entry_points_once():
    """Each Trainer asks all installed packages for callbacks, which takes as long as a short run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"lightning.fabric.utilities.registry", "lightning_fabric.utilities.registry"} & sys.modules.keys():
            patch.setattr(sys.modules[name], "entry_points", cache(sys.modules[name].entry_points))
        yield


@pytest.fixture(autouse=True, scope="session")
def _quiet_lightning():
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
