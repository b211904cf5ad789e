"""bf16 replaced in an exported file, for what has none: only as far as recorded ranges allow it."""

import json

import onnxruntime
import pytest
import torch
from torch import nn

from lightning_mixprec import MixPrecError, export

POLICY = {"default": "bf16", "2": "fp32"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))


def exported(tmp_path, **options):
    options = {"policy": POLICY, "example_inputs": torch.ones(2, 8), "format": "onnx"} | options
    return export(network(), tmp_path / "model.onnx", **options)


def test_onnxruntime_has_no_bf16_on_a_cpu(tmp_path):
    made = exported(tmp_path)
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|not implemented|Could not find an implementation"):
        onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("instead", "ranges"),
    [pytest.param("fp32", None, marks=pytest.mark.slow), ("fp16", {"0": 12.0, "3": 3e4})],
)
def test_what_replaces_it_runs_there(tmp_path, instead, ranges):
    made = exported(tmp_path, bf16_as=instead, ranges=ranges)
    assert made.layers == {"0": instead, "1": instead, "2": "fp32", "3": instead}
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: torch.ones(2, 8).numpy()})
    with torch.no_grad():
        wide = network()(torch.ones(2, 8))
    assert torch.allclose(torch.from_numpy(found).float(), wide, rtol=5e-3, atol=5e-3)


def test_a_layer_whose_numbers_are_too_large_is_named(tmp_path):
    with pytest.raises(MixPrecError, match="layer '3' cannot go from bf16 to fp16: its output reached 5e.04"):
        exported(tmp_path, bf16_as="fp16", ranges={"0": 12.0, "3": 5e4})
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_was_not_recorded_is_named(tmp_path):
    with pytest.raises(MixPrecError, match="layer '3' cannot go from bf16 to fp16: no range of its output"):
        exported(tmp_path, bf16_as="fp16", ranges={"0": 12.0})


@pytest.mark.slow
def test_ranges_are_read_from_what_a_run_recorded(tmp_path):
    def row(layer, bits):
        fits = {"underflow_rate": 0.0, "overflow_rate": 0.0, "best_scale": 1.0, "fits": True}
        rates = dict.fromkeys(("underflow_rate", "subnormal_share", "headroom_bits"), 0.0)
        flows = dict.fromkeys(("flow_underflow_rate", "flow_subnormal_share", "flow_headroom_bits"))
        place = {"monitor": "underflow", "step": 1, "epoch": 0, "batch_idx": 0, "loss_scale": 1.0, "format": "bf16"}
        return place | rates | flows | {"layer": layer, "output_headroom_bits": bits, "what_if": {"fp16": fits}}

    run = tmp_path / "run"
    run.mkdir()
    rows = [row("0", 120.0), row("3", 110.0)]
    (run / "mixprec.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(MixPrecError, match="layer '3' cannot go from bf16 to fp16: its output reached 2.61e.05"):
        exported(tmp_path / "files", bf16_as="fp16", ranges=run)
    made = exported(
        tmp_path / "files", bf16_as="fp16", ranges=run, policy={"default": "bf16", "2": "fp32", "3": "fp32"}
    )
    assert made.layers["0"] == "fp16"


def test_int8_keeps_16_bits_around_it(tmp_path):
    with pytest.raises(MixPrecError, match="layer '3' computes in fp8, and what its products take and give"):
        exported(tmp_path, policy=POLICY | {"3": "fp8"}, bf16_as="fp32")
