"""The names that users rely on, and nothing beside them."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from selection import slow

import lightning_mixprec

CLASSES = [
    "AdaptivePrecision",
    "ExponentHistogram",
    "FidelityMonitor",
    "LossScaling",
    "MixPrecCLI",
    "MixPrecError",
    "OverflowMonitor",
    "OverflowRate",
    "PerLayerFSDPPrecision",
    "PerLayerPrecision",
    "PrecisionPlan",
    "PrecisionPolicy",
    "PrecisionReport",
    "PrecisionScheduler",
    "Rule",
    "SQNR",
    "UnderflowMonitor",
    "UnderflowRate",
]
COMPARE = "module policies batches reference metric repeats trainer step weights max_batches emulate seed"
EXPORT = "module path policy example_inputs format dynamic_shapes opset external_data bf16_as ranges"
PLAN = "module batches formats device budget pin seed trainer max_batches"
FUNCTIONS = {
    "compare": COMPARE.split(),
    "diagnose": ["module", "batch", "policy", "loss_scale", "batch_idx"],
    "export": EXPORT.split(),
    "plan": PLAN.split(),
}
PUBLIC = [*CLASSES, *FUNCTIONS]


def test_all_is_the_documented_list():
    assert sorted(lightning_mixprec.__all__) == sorted(PUBLIC)


def test_nothing_else_is_public():
    found = {name for name, value in vars(lightning_mixprec).items() if not isinstance(value, ModuleType)}
    assert {name for name in found if not name.startswith("_")} == set(PUBLIC) - {"MixPrecCLI"}  # when it is asked for


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    function = getattr(lightning_mixprec, name)
    assert inspect.isfunction(function)
    parameters = inspect.signature(function).parameters
    assert list(parameters) == FUNCTIONS[name]
    assert all(f"{name}:" in function.__doc__ for name in parameters)


@pytest.mark.parametrize("name", CLASSES)
def test_each_name_is_a_documented_class_of_this_package(name):
    value = getattr(lightning_mixprec, name)
    assert inspect.isclass(value)
    assert value.__module__.startswith("lightning_mixprec.")
    # What a dataclass without a docstring gets is its signature.
    assert value.__dict__["__doc__"]
    assert not value.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_are_documented(name):
    for attribute, value in vars(getattr(lightning_mixprec, name)).items():
        if callable(value) and not attribute.startswith("_"):
            assert inspect.getdoc(getattr(getattr(lightning_mixprec, name), attribute)), f"{name}.{attribute}"


def test_all_errors_are_one_family():
    from lightning_mixprec import errors

    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    assert all(issubclass(each, lightning_mixprec.MixPrecError) for each in classes)
    assert issubclass(lightning_mixprec.MixPrecError, ValueError)


@pytest.mark.parametrize("first", ["lightning.pytorch", slow("pytorch_lightning")])
def test_importing_warns_nobody_and_configures_nothing(first):
    """Takes some ten seconds, in which a fresh process imports torch and Lightning."""
    script = f"""
import logging, os, sys, torch, warnings, {first}
from lightning_utilities.core import rank_zero
def state():
    loggers = [logging.root, *map(logging.getLogger, ("lightning_mixprec", "{first}"))]
    logs = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    defaults = torch.get_default_dtype(), torch.no_grad, torch.autocast, dict(os.environ)
    return logs, defaults, rank_zero.log, rank_zero.rank_zero_deprecation_category
before, loaded = state(), set(sys.modules)
import lightning_mixprec
assert state() == before
optional = {{"sklearn", "torchvision", "jsonargparse", "rich", "matplotlib", "hypothesis"}}
assert not (set(sys.modules) - loaded) & optional
"""
    command = [sys.executable, "-W", "error", "-c", script]
    folder = Path(lightning_mixprec.__file__).parents[1]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""
