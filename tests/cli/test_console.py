"""The console script: what each command prints, and its exit status."""

import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy
import pytest
import torch
from torch import nn

from lightning_mixprec.cli import doctor
from lightning_mixprec.cli.console import main
from lightning_mixprec.numerics.devices import native_support


def made():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def needy(width):
    return nn.Linear(width, width)


def no_model():
    return 3


def run(capsys, *args):
    try:
        status = main(args)
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_formats_are_those_of_an_independent_library(capsys):
    status, out, _ = run(capsys, "formats")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:9]}
    known = {
        "fp64": numpy.finfo("float64"),
        "fp32": numpy.finfo("float32"),
        "bf16": ml_dtypes.finfo("bfloat16"),
        "fp16": numpy.finfo("float16"),
        "e4m3": ml_dtypes.finfo("float8_e4m3fn"),
        "e5m2": ml_dtypes.finfo("float8_e5m2"),
    }
    assert status == 0 and set(known) < set(rows)
    for name, info in known.items():
        printed = [float(cell) for cell in rows[name][1:6]]
        numbers = [info.bits, info.max, info.smallest_normal, info.smallest_subnormal, info.eps]
        assert printed == pytest.approx([float(number) for number in numbers], rel=1e-4)


def test_a_good_policy_is_no_finding(tmp_path, capsys):
    path = tmp_path / "policy.yaml"
    path.write_text("default: bf16\n'**.norm': fp32\n")
    assert run(capsys, "check", str(path)) == (0, "default bf16\n**.norm -> c=fp32\n", "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("default: bf17\n", "unknown format 'bf17', did you mean 'bf16'?"),
        ("default: bf16\nrules: [{layers: head, comput: fp32}]\n", "comput"),
        ("default: [\n", "policy.yaml"),
    ],
)
def test_a_bad_policy_is_a_finding_of_one_line(tmp_path, capsys, text, says):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    status, out, err = run(capsys, "check", str(path))
    assert (status, err) == (1, "")
    assert re.fullmatch(rf"finding: [^\n]*{re.escape(says)}[^\n]*\n", out)


def test_a_policy_on_a_model_is_its_table_or_a_finding(tmp_path, capsys):
    path = tmp_path / "policy.yaml"
    path.write_text("default: bf16\nrules: [{types: LayerNorm, compute: fp32}]\n")
    status, out, _ = run(capsys, "check", str(path), "--model", f"{__name__}:made")
    assert status == 0
    assert re.search(r"^1 +LayerNorm +4 +fp32/fp32/-", out, re.MULTILINE)
    path.write_text("default: bf16\nrules: [{types: BatchNorm2d, compute: fp32}]\n")
    status, out, _ = run(capsys, "check", str(path), "--model", f"{__name__}:made")
    assert status == 1
    assert "finding: " in out and "BatchNorm2d" in out


def test_a_policy_on_a_device_that_lacks_a_format_is_a_finding(capsys):
    status, out, _ = run(capsys, "check", "bf16", "--device", "T4")
    assert status == 1 and re.search(r"^finding: .*bf16.*T4", out, re.MULTILINE)
    assert run(capsys, "check", "bf16", "--device", "a100")[0] == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["check", "bf16", "--device", "a1000"], "did you mean 'a100'?"),
        (["check", "none.yaml"], "there is no file 'none.yaml'"),
        (["check", "bf16", "--model", "torch.nn"], "write MODULE:CLASS"),
        (["check", "bf16", "--model", "no_such_module:Net"], "could not be made: ModuleNotFoundError"),
        (["check", "bf16", "--model", f"{__name__}:needy"], "could not be made: TypeError"),
        (["check", "bf16", "--model", f"{__name__}:no_model"], "gave a int"),
        (["report", "no_such_run"], "no_such_run"),
        (["report", "a", "b", "c"], "3 runs were given"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_use_is_two_and_says_what_is_right(capsys, args, says):
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert says in err


def test_a_report_of_a_run(tmp_path, capsys):
    pytest.importorskip("jinja2")
    (tmp_path / "mixprec.jsonl").write_text('{"kind": "skipped_step", "step": 3, "scale": 2.0}\n')
    status, out, _ = run(capsys, "report", str(tmp_path), "--output", str(tmp_path / "here.html"))
    assert status == 0
    assert out.startswith(str(tmp_path / "here.html")) and "<html" in (tmp_path / "here.html").read_text()


def test_the_doctor_says_what_is_there(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert f"torch {torch.__version__}\n" in out and f"Python {sys.version.split()[0]} on " in out
    for format in ("fp32", "bf16", "fp16"):
        native = "yes" if native_support(format, "cpu").native else "no"
        assert re.search(rf"^  {format} +{native} +[\d.e+]+  ", out, re.MULTILINE)


def test_the_doctor_names_what_an_extra_lacks(monkeypatch, capsys):
    there = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "scipy" else there(name))
    _, out, _ = run(capsys, "doctor")
    assert 'extra plan: scipy missing (pip install "lightning_mixprec[plan]")' in out
    assert re.search(r"extra test: .*scipy.* missing", out)  # which takes it from the other


def test_a_driver_without_a_device_is_a_finding(monkeypatch, tmp_path, capsys):
    (tmp_path / "version").write_text("NVRM")
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, _ = run(capsys, "doctor")
    assert status == 1 and "finding: this machine has an NVIDIA driver" in out


@pytest.mark.slow
def test_the_script_is_installed():
    script = Path(sys.executable).with_name("mixprec")
    done = subprocess.run([script, "formats"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("format ")
