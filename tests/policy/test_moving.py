"""A policy for another device: what it lacks is replaced by what holds the numbers, each time with the reason."""

import json
import math
import re

import pytest
import torch
from plugin_models import one_line
from torch import nn

from lightning_mixprec import MixPrecError, PrecisionPolicy, Rule
from lightning_mixprec.numerics.devices import DEVICES
from lightning_mixprec.numerics.formats import FORMATS
from lightning_mixprec.numerics.ranges import read_ranges
from lightning_mixprec.policy.moving import Replacement

SMALL, LARGE = 12.0, 1e6


def net():
    return nn.ModuleDict({"net": nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))})


def computes(policy, model):
    return {name: layer.compute for name, layer in policy.resolve(model).items() if name.startswith("net.")}


def layers(*formats):
    return {f"net.{place}": format for place, format in enumerate(formats)}


def ranges(**magnitudes):
    """Small outputs everywhere but in the layers that are named by their number."""
    known = {"net": SMALL, **{f"net.{place}": SMALL for place in range(5)}}
    return {**known, **{f"net.{name[1:]}": amax for name, amax in magnitudes.items()}}


def test_what_a_device_has_stays():
    policy = PrecisionPolicy("bf16", [Rule("net.4", compute="fp8"), Rule("net.0", compute="fp16", output="input")])
    there = policy.for_device("h100")
    assert there == policy and there.replacements == ()


def test_bf16_gives_way_to_fp16_where_it_holds_what_was_recorded():
    there = PrecisionPolicy("bf16").for_device("T4", ranges=ranges())
    assert there == PrecisionPolicy("fp16")
    (told,) = there.replacements
    assert (told.where, told.key, told.old, told.new) == ("default", "default", "bf16", "fp16")
    assert "has no bf16 arithmetic" in told.reason and "fp16 holds 6 layers, at most 12 in 'net'" in told.reason


@pytest.mark.parametrize("known", [None, {}])
def test_and_to_fp32_where_nothing_is_known(known):
    there = PrecisionPolicy("bf16").for_device("t4", ranges=known)
    assert there == PrecisionPolicy("fp32") and "no ranges were given" in there.replacements[0].reason


def test_a_layer_that_fp16_does_not_hold_computes_in_fp32_and_so_does_the_one_that_takes_its_output():
    there = PrecisionPolicy("bf16").for_device("t4", ranges=ranges(n2=LARGE))
    assert computes(there, net()) == layers("fp16", "fp16", "fp32", "fp32", "fp16")
    told = {each.where: each.reason for each in there.replacements}
    assert "its output reaches 1e+06, and fp16 ends at 65504" in told["'net.2'"]
    assert "it comes after 'net.2'" in told["'net.3'"]


def test_the_translated_policy_is_finite_where_fp16_alone_is_not():
    """The numbers themselves: a layer that hands on 1e6, and one that takes it and hands on little."""
    from lightning_mixprec.engine.apply import attach

    model = net()
    for place, scale in ((2, 1e6), (3, 1e-6)):
        with torch.no_grad():
            model.net[place].weight.copy_(scale * torch.eye(2))
    known, hooks = {}, []
    for name, layer in model.named_modules():
        if name.startswith("net."):
            hook = lambda module, inputs, output, name=name: known.update({name: float(output.detach().abs().max())})  # noqa: E731
            hooks.append(layer.register_forward_hook(hook))
    x = torch.ones(1, 2)
    expected = model.net(x)
    for hook in hooks:
        hook.remove()

    def runs(policy):
        attachment = attach(model, policy.resolve(model), "cpu", True)
        with attachment.context():
            output = model.net(x)
        attachment.detach()
        return output.float()

    assert not runs(PrecisionPolicy("fp16")).isfinite().all()
    there = PrecisionPolicy("bf16").for_device("t4", ranges=known)
    assert torch.allclose(runs(there), expected, rtol=5e-3)


@pytest.mark.parametrize(("amax", "fits"), [(32752.0, True), (32753.0, False), (65505.0, False), (float("inf"), False)])
def test_a_bit_is_left_for_what_no_sample_saw(amax, fits):
    there = PrecisionPolicy("bf16").for_device("t4", ranges={"net.0": SMALL, "net.4": amax})
    assert computes(there, net())["net.4"] == ("fp16" if fits else "fp32")


def test_each_rule_is_judged_by_the_layers_that_it_decides_for():
    policy = PrecisionPolicy(
        "fp32", [Rule("net.0", compute="bf16", output="bf16"), Rule("net.[2:]", compute="bf16", output="input")]
    )
    there = policy.for_device("t4", ranges=ranges(n2=LARGE))
    assert computes(there, net()) == layers("fp16", "fp32", "fp32", "fp32", "fp16")
    assert there.resolve(net())["net.0"].output == "fp16"
    assert there.resolve(net())["net.2"].output == "input"  # as the rule says that it had its formats from


def test_a_rule_by_type_may_be_for_any_layer():
    policy = PrecisionPolicy("fp32", [Rule(types="Linear", compute="bf16")])
    assert computes(policy.for_device("t4", ranges=ranges()), net()) == layers(*["fp16"] * 5)
    there = policy.for_device("t4", ranges=ranges(n1=LARGE))
    assert computes(there, net()) == layers(*["fp32"] * 5)
    assert "'net.1': its output reaches" in there.replacements[0].reason


def test_a_container_that_hands_on_too_much_does_not_take_its_layers_with_it():
    there = PrecisionPolicy("bf16").for_device("t4", ranges={"net": LARGE, "net.0": SMALL, "net.1": SMALL})
    assert there.resolve(net())["net"].compute == "fp32"
    assert computes(there, net())["net.0"] == "fp16"


def test_names_need_not_come_in_the_models_order():
    known = {"net.3": SMALL, "head.b": SMALL, "net.1": LARGE, "head.a": SMALL, "net.2": SMALL}
    there = PrecisionPolicy("bf16").for_device("t4", ranges=known)
    assert {rule.layers for rule in there.rules} == {"net.1", "head.a"}  # after net.1 in the order that was given


EIGHT = Rule("net.1", compute="fp8", scaling="row", gradients="input")


@pytest.mark.parametrize(
    ("device", "known", "expected"),
    [("a100", None, "bf16"), ("t4", None, "fp32"), ("t4", ranges(), "fp16"), ("t4", ranges(n1=LARGE), "fp32")],
)
def test_8_bits_give_way_step_by_step(device, known, expected):
    there = PrecisionPolicy("fp32", [EIGHT]).for_device(device, ranges=known)
    (rule,) = [rule for rule in there.rules if rule.layers == "net.1"]
    assert rule == Rule("net.1", compute=expected)
    assert computes(there, net())["net.1"] == expected
    assert there.replacements[0].old == "fp8" and "has no fp8 arithmetic" in there.replacements[0].reason


def test_int8_stays_on_a_t4_and_not_on_a_v100():
    policy = PrecisionPolicy("fp32", [Rule("net.1", compute="int8")])
    assert policy.for_device("t4") == policy
    assert policy.for_device("v100", ranges=ranges()).rules[0].compute == "fp16"


def test_weights_stay_stored_as_they_are():
    there = PrecisionPolicy("fp32", [Rule("net.1", param="bf16", compute="bf16")]).for_device("t4")
    assert there.rules == (Rule("net.1", param="bf16", compute="fp32"),)


@pytest.mark.parametrize("device", [device.name for device in DEVICES])
def test_nothing_is_left_that_the_device_lacks(device):
    computed = [name for name, format in FORMATS.items() if format.use.is_computed_in]
    policy = PrecisionPolicy("bf16", [Rule(f"net.{place}", compute=name) for place, name in enumerate(computed[1:])])
    there = policy.for_device(device, ranges=ranges(n2=LARGE))
    asked = next(each for each in DEVICES if each.name == device)
    used = {there.default, *(rule.compute for rule in there.rules)}
    assert all(asked.support(format).native for format in used)
    assert there.for_device(device, ranges=ranges(n2=LARGE)).replacements == ()
    assert there.resolve(net())


def test_a_replacement_is_a_line():
    there = PrecisionPolicy("bf16", [EIGHT]).for_device("t4")
    assert [re.sub(r" \(.*", "", str(each)) for each in there.replacements] == [
        "default: bf16 -> fp32",
        "net.1: compute fp8 -> fp32",
    ]
    assert all("\n" not in str(each) and isinstance(each, Replacement) for each in there.replacements)


def test_the_translated_policy_is_a_policy_like_any_other(tmp_path):
    there = PrecisionPolicy("bf16").for_device("t4", ranges=ranges(n2=LARGE))
    there.to_file(tmp_path / "t4.yaml")
    assert PrecisionPolicy.from_file(tmp_path / "t4.yaml") == there


@pytest.mark.parametrize(
    ("match", "name", "known"),
    [
        ("'h10' is not in the table of devices, did you mean 'h100'", "h10", None),
        ("is not in the table of devices", 4, None),
        ("ranges is a int; give a mapping", "t4", 3),
        ("there is no 'nowhere'", "t4", "nowhere"),
        ("has the name 0", "t4", {0: 1.0}),
        ("says -1.0 of 'net.0'", "t4", {"net.0": -1.0}),
        ("says None of 'net.0'", "t4", {"net.0": None}),
    ],
)
def test_a_mistake_is_one_line(match, name, known):
    with pytest.raises(MixPrecError, match=match) as caught:
        PrecisionPolicy("bf16").for_device(name, ranges=known)
    assert one_line(caught)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so the name is right")
def test_a_cuda_device_that_is_not_there_is_a_mistake():
    with pytest.raises(MixPrecError, match="'cuda:0' is no device of this machine: torch sees no CUDA device"):
        PrecisionPolicy("bf16").for_device("cuda:0")


def test_a_file_without_magnitudes_says_who_writes_them(tmp_path):
    (tmp_path / "mixprec.jsonl").write_text(json.dumps({"monitor": "overflow", "step": 0}) + "\n{cut")
    with pytest.raises(MixPrecError, match="has no rows of UnderflowMonitor") as caught:
        PrecisionPolicy("bf16").for_device("t4", ranges=tmp_path)
    assert one_line(caught)


def row(layer, bits, fits=True, format="bf16", **changes):
    what_if = {"underflow_rate": 0.0, "overflow_rate": 0.0, "best_scale": 1.0, "fits": fits}
    empty = dict.fromkeys(("flow_underflow_rate", "flow_subnormal_share", "flow_headroom_bits"))
    told = {"underflow_rate": 0.0, "subnormal_share": 0.0, "headroom_bits": 9.0, **empty}
    place = {"monitor": "underflow", "step": 0, "epoch": 0, "batch_idx": 0, "layer": layer, "loss_scale": 1.0}
    return {**place, **told, "format": format, "output_headroom_bits": bits, "what_if": {"fp16": what_if}, **changes}


def test_the_largest_of_all_samples_counts_and_what_fits_at_no_scale_does_not_go_to_fp16(tmp_path):
    bf16, fp32 = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).max
    rows = [
        row("net.0", math.log2(bf16 / 8.0)),
        row("net.0", math.log2(fp32 / 40.0), format="fp32"),
        row("net.1", None),
        row("net.2", math.log2(bf16 / 8.0), fits=False),
        row("net.3", "?"),
        row("net.4", math.log2(bf16 / 1e6)),
    ]
    path = tmp_path / "mixprec.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows) + '{"monitor": "underflow", "cut')
    known = read_ranges(path)
    assert {name: each.amax for name, each in known.items()} == pytest.approx(
        {"net.0": 40.0, "net.1": 0.0, "net.2": 8.0, "net.4": 1e6}
    )
    there = PrecisionPolicy("bf16").for_device("t4", ranges=str(tmp_path))
    assert computes(there, net()) == layers("fp16", "fp16", "fp32", "fp16", "fp32")
    assert "fits fp16 at no loss scale" in there.replacements[1].reason
