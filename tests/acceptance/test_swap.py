"""The acceptance plugin itself: a file in the manner of Lightning's tests, run in a pytest of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

TESTS = """
import pickle
import subprocess
import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins import precision as package
from lightning.pytorch.plugins.precision import MixedPrecision as Alias
from lightning.pytorch.plugins.precision import MixedPrecisionPlugin, Precision, amp
from lightning.pytorch.trainer.connectors import accelerator_connector, checkpoint_connector
from lightning.pytorch.callbacks import throughput_monitor

from lightning_mixprec import PerLayerPrecision


def trainer(tmp_path, **options):
    return pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, fast_dev_run=2, **options)


def test_every_module_that_names_it_has_ours():
    modules = [package, amp, accelerator_connector, checkpoint_connector, throughput_monitor, pl.plugins]
    assert {module.MixedPrecision for module in modules} == {MixedPrecision} == {Alias}
    assert issubclass(MixedPrecision, PerLayerPrecision)
    assert issubclass(MixedPrecisionPlugin, MixedPrecision)


def test_the_trainer_builds_and_trains_with_ours(tmp_path):
    run = trainer(tmp_path, precision="16-mixed")
    run.fit(BoringModel())
    assert isinstance(run.precision_plugin, PerLayerPrecision)
    assert isinstance(run.precision_plugin, MixedPrecision)
    assert run.precision_plugin.policy.default == "fp16"
    assert run.precision_plugin.scaler.get_scale() > 1


def test_plain_precision_is_ours_too_and_still_a_precision(tmp_path):
    run = trainer(tmp_path)
    run.fit(BoringModel())
    assert isinstance(run.precision_plugin, PerLayerPrecision)
    assert run.precision_plugin.scaler.get_scale() == 1024
    assert isinstance(trainer(tmp_path, plugins=Precision()).precision_plugin, Precision)


def test_the_constructor_is_lightnings():
    assert MixedPrecision("bf16-mixed", device="cpu").device == "cpu"
    with pytest.raises(ValueError, match="Precision must be '16-mixed' or 'bf16-mixed'"):
        MixedPrecision("16", "cpu")


def test_a_process_that_is_handed_the_plugin_swaps_too():
    child = (
        "import pickle, sys; plugin = pickle.load(sys.stdin.buffer);"
        "from lightning.pytorch.plugins import MixedPrecision; assert MixedPrecision is type(plugin)"
    )
    subprocess.run([sys.executable, "-c", child], input=pickle.dumps(MixedPrecision("16-mixed", "cpu")), check=True)


def test_a_failing_assertion_is_a_failure(tmp_path):
    run = trainer(tmp_path, precision="16-mixed")
    run.fit(BoringModel())
    assert run.global_step == -1
"""

COMPARED = """<testsuites><testsuite>
<testcase classname="a" name="kept"/>
<testcase classname="a" name="broken">{broken}</testcase>
<testcase classname="a" name="left out"><skipped/></testcase>
</testsuite></testsuites>"""


def run(*arguments, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_lightnings_tests_get_our_plugin_and_can_fail(tmp_path):
    (tmp_path / "test_boring.py").write_text(TESTS)
    options = ["--mixprec-policy", "fp16", "--mixprec-plain", "scaled", "-p", "no:cacheprovider", "-q", "-rA"]
    output = run("-m", "pytest", "-p", "swap", *options, "test_boring.py", folder=tmp_path).stdout
    failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert failed == ["FAILED test_boring.py::test_a_failing_assertion_is_a_failure"], output
    assert "== -1" in output
    assert "5 passed" in output


def test_compare_names_what_differs(tmp_path):
    (tmp_path / "stock.xml").write_text(COMPARED.format(broken=""))
    (tmp_path / "ours.xml").write_text(COMPARED.format(broken="<failure/>"))
    output = run(str(HERE / "compare.py"), "stock.xml", "ours.xml", folder=tmp_path).stdout
    assert output.splitlines() == [
        "2 passed / 0 failed / 1 skipped  ->  1 passed / 1 failed / 1 skipped",
        "passed -> failed: a::broken",
    ]
