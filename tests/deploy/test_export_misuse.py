"""What is wrong in what ``export`` is given is said in one line, and leaves no file."""

import builtins
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_mixprec import MixPrecError, PrecisionPolicy, export
from lightning_mixprec.deploy.exporting import onnx_files
from lightning_mixprec.deploy.exporting.protocol import Opened
from lightning_mixprec.deploy.exporting.pt2 import Pt2


class WithoutForward(nn.Module):
    pass


class LightningWithoutForward(pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return batch.sum()


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return {1, 2} if x is None else object()


class Flow(nn.Module):
    """Takes a branch by value, which no tracer of graphs can follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Remembering(nn.Module):
    """Goes on from the state that its last call left."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.state = nn.GRUCell(2, 2), None

    def forward(self, x):
        self.state = self.cell(x, torch.zeros_like(x) if self.state is None else self.state)
        return self.state


LINEAR = {"module": nn.Linear(2, 2), "policy": "bf16", "example_inputs": torch.ones(1, 2)}
WRONG = {
    "module without forward": ({"module": WithoutForward()}, "WithoutForward has no forward to be exported"),
    "LightningModule without forward": ({"module": LightningWithoutForward()}, "has no forward to be exported"),
    "list of modules": ({"module": nn.ModuleList([nn.Linear(2, 2)])}, "ModuleList has no forward"),
    "no module": ({"module": "model.ckpt"}, "a str is to be exported; give a torch.nn.Module"),
    "too many inputs": ({"example_inputs": (torch.ones(1, 2),) * 2}, r"do not fit Linear.forward\(input\): too many"),
    "unknown name": ({"example_inputs": {"x": torch.ones(1, 2)}}, r"do not fit Linear.forward\(input\)"),
    "no tensor": ({"example_inputs": 3}, "example_inputs is a int without a tensor"),
    "wrong shape": ({"example_inputs": torch.ones(1, 3)}, "Linear cannot be run on example_inputs under this policy"),
    "policy of another model": (
        {"policy": {"default": "bf16", "model.head": "fp32"}},
        r"rule 1 \(model.head\) matches no layer of Linear",
    ),
    "no policy": ({"policy": 3}, "policy is 3"),
    "unknown format": ({"format": "tflite"}, "format 'tflite'; it is one of 'pt2', 'aoti', 'onnx'"),
    "format that is none": ({"format": None}, "format None; it is one of"),
    "strange result": ({"module": Strange()}, "forward returns a object, which a file cannot hold"),
    "state from call to call, onnx": (
        {"module": Remembering(), "format": "onnx", "policy": "fp32", "path": "m.onnx"},
        "Remembering.forward returns something else when it is called again",
    ),
    "state from call to call, weights": (
        {"module": Remembering(), "format": "weights", "path": "m.pt"},
        "Remembering.forward returns something else when it is called again",
    ),
    "branch by value": ({"module": Flow()}, "torch.export cannot trace Flow.forward"),
    "suffix of weights": ({"format": "weights", "path": "m.npz"}, "end it in .safetensors, or in .pt"),
    "suffix of a package": ({"format": "aoti", "path": "m.so"}, "an aoti package is called '\\*.pt2', here 'm.so'"),
    "suffix of another format": (
        {"path": "m.onnx"},
        "'m.onnx' is called as a file of onnx is, and the format is 'pt2'; say format='onnx', or end the path in .pt2",
    ),
    "suffix of two other formats": (
        {"format": "onnx", "path": "m.pt2"},
        "called as a file of pt2 or aoti is, and the format is 'onnx'; say format='pt2', or end the path in .onnx",
    ),
    "weights called as a graph": ({"format": "weights", "path": "m.onnx"}, "say format='onnx', or end the path in"),
    "path": ({"path": 3}, "path is 3; give the path of the file"),
    "no path": ({"path": ""}, "path is ''; give the path of the file"),
    **{
        f"opset {opset!r}": (
            {"format": "onnx", "path": "m.onnx", "opset": opset},
            f"opset is {opset!r}; give a whole number from 18 on",
        )
        for opset in ("18", True, 18.0, 0, -1, 17)
    },
    "opset that torch does not write": (
        {"format": "onnx", "path": "m.onnx", "opset": 99, "policy": "fp32"},
        r"opset 99|torch wrote opset \d+ where 99 was asked for",
    ),
    "opset of another format": ({"opset": 18}, "opset is for files of onnx, and the format is 'pt2'; leave it out"),
    "external data of another format": ({"external_data": True}, "external_data is for files of onnx"),
    "external data": (
        {"format": "onnx", "path": "m.onnx", "external_data": "yes"},
        "external_data is 'yes'; it is True or False",
    ),
    "ranges for nothing": ({"ranges": {"": 1.0}}, "ranges are for bf16_as='fp16', and it is None"),
    "shapes of TorchScript": (
        {"format": "torchscript", "path": "m.ts", "dynamic_shapes": {"input": {0: None}}},
        "has no dynamic_shapes",
    ),
    "shapes of no argument": ({"dynamic_shapes": {"y": {0: None}}}, "dynamic_shapes names 'y'"),
    "bf16 as another": ({"bf16_as": "int8"}, "bf16_as is 'int8'; it is 'fp32', or 'fp16' with ranges"),
    "bf16 as fp16 without ranges": ({"bf16_as": "fp16"}, "layer '' cannot go from bf16 to fp16: no range"),
    "ranges that are none": ({"bf16_as": "fp16", "ranges": "no_such_run"}, "there is no 'no_such_run'"),
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG.keys())
def test_is_one_line_and_leaves_no_file(tmp_path, given):
    options, says = given
    path = options.get("path", "model.pt2")
    path = tmp_path / path if isinstance(path, str) and path else path
    with warnings.catch_warnings(), pytest.raises(MixPrecError, match=says) as raised:
        warnings.simplefilter("ignore", FutureWarning)
        export(**LINEAR | options | {"path": path})
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "format", "path"),
    [("onnx", "onnx", "m.onnx"), ("onnxscript", "onnx", "m.onnx"), ("safetensors.torch", "weights", "m.safetensors")],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, format, path):
    import_module = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MixPrecError, match=r"pip install 'lightning_mixprec\[export\]'"):
        export(**LINEAR, path=tmp_path / path, format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MixPrecError, match="cannot be written: .*; nothing was"):
        export(**LINEAR, path=tmp_path / "file" / "model.pt2")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(MixPrecError, match="cannot be written"):
            export(**LINEAR, path=tmp_path / "model.pt2")
    finally:
        tmp_path.chmod(0o700)


def test_what_stood_there_is_whole_after_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    export(**LINEAR, path=path)
    before = path.read_bytes()

    def cut_short(self, path, job):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Pt2, "write", cut_short)
    with pytest.raises(MixPrecError, match="No space left on device"):
        export(**LINEAR, path=path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    opened = Pt2.opened

    def off_by_a_bit(self, path, job):
        found = opened(self, path, job)
        return Opened(lambda: [each * 1.01 for each in found.run()], found.uses, found.is_exact)

    monkeypatch.setattr(Pt2, "opened", off_by_a_bit)
    with pytest.raises(MixPrecError, match="the pt2 file computes otherwise than the module"):
        export(**LINEAR, path=tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_layer_that_a_writer_moved_to_another_format_is_named(tmp_path, monkeypatch):
    """torch's own optimizer for ONNX folds a batch norm into the convolution before it, in fp32."""
    from onnxscript import optimizer

    monkeypatch.setattr(onnx_files, "_fold_casts_of_weights", optimizer.optimize)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(MixPrecError, match="layer '1' is assigned bf16, and its Conv is in fp32 in the onnx file"):
        export(
            model, tmp_path / "m.onnx", policy="bf16", example_inputs=torch.ones(1, 3, 8, 8), format="onnx", opset=18
        )
    assert list(tmp_path.iterdir()) == []


def test_a_policy_object_is_taken(tmp_path):
    made = export(**LINEAR | {"policy": PrecisionPolicy("fp16")}, path=str(tmp_path / "model.pt2"))
    assert made.layers == {"": "fp16"}
    assert str(made) == f"{tmp_path}/model.pt2 (pt2): layers 1 in fp16; largest difference 0"
