import math

import ml_dtypes
import numpy as np
import pytest
import torch

from lightning_mixprec.errors import FormatError, MixPrecError
from lightning_mixprec.numerics.formats import (
    FORMATS,
    Format,
    compute_dtypes,
    compute_formats,
    format_of,
    get_format,
    half_dtypes,
    is_wider,
    low_precision_formats,
    param_formats,
    promoted_for_range,
    region_formats,
    stored_dtypes,
    trained_in,
)

# What NumPy and ml_dtypes call the formats: written down here, so that the table is checked and not echoed.
ORACLE = {
    "fp64": np.float64,
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
DTYPE = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def test_the_table_holds_the_documented_formats_widest_first():
    assert list(FORMATS) == ["fp64", "fp32", "bf16", "fp16", "fp8", "e4m3", "e5m2", "int8"]
    assert all(get_format(name) is format and format.name == name for name, format in FORMATS.items())


@pytest.mark.parametrize("name", ORACLE)
def test_properties_agree_with_ml_dtypes(name):
    format, info = get_format(name), ml_dtypes.finfo(ORACLE[name])
    assert format.max == float(info.max)
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)
    assert format.epsilon == float(info.eps)
    assert format.min_exponent == info.minexp
    assert format.max_exponent == math.frexp(float(info.max))[1] - 1
    assert format.mantissa_bits == info.nmant
    assert format.bits == info.bits


@pytest.mark.parametrize("name", DTYPE)
def test_properties_agree_with_torch(name):
    format, info = get_format(name), torch.finfo(DTYPE[name])
    assert format.dtype == DTYPE[name]
    assert (format.max, format.smallest_normal, format.epsilon) == (info.max, info.smallest_normal, info.eps)
    assert format.bits == info.bits


def test_numbers_everybody_quotes():
    assert (get_format("fp16").max, get_format("fp16").smallest_subnormal) == (65504.0, 2.0**-24)
    assert (get_format("bf16").smallest_subnormal, get_format("bf16").epsilon) == (2.0**-133, 2.0**-7)
    assert (get_format("e4m3").max, get_format("e4m3").smallest_subnormal) == (448.0, 2.0**-9)
    assert (get_format("e5m2").max, get_format("e5m2").smallest_subnormal) == (57344.0, 2.0**-16)


LOW = ["bf16", "fp16", "fp8", "e4m3", "e5m2", "int8"]


def test_low_precision_means_16_bits_or_fewer():
    assert [name for name in FORMATS if get_format(name).is_low_precision] == LOW


def test_fp8_is_the_pair():
    fp8 = get_format("fp8")
    assert fp8.parts == (get_format("e4m3"), get_format("e5m2"))
    assert (fp8.forward.name, fp8.backward.name) == ("e4m3", "e5m2")
    assert (fp8.bits, fp8.max) == (8, get_format("e4m3").max)


def test_int8_is_the_whole_numbers_up_to_127():
    int8, info = get_format("int8"), torch.iinfo(torch.int8)
    assert (int8.max, int8.bits, int8.dtype) == (info.max, info.bits, torch.int8)
    assert (int8.smallest_subnormal, int8.max_exponent) == (1.0, 6)
    assert int8.is_integer
    assert [name for name in FORMATS if get_format(name).is_integer] == ["int8"]
    assert all(get_format(name).contains(int8) for name in ("fp64", "fp32", "bf16", "fp16"))
    assert not any(get_format(name).contains(int8) for name in ("e4m3", "e5m2"))
    assert not int8.contains(get_format("e5m2"))
    assert format_of(torch.int8) is None, "no tensor of integers is stored in it"


def test_lists_for_tensors_and_statistics_have_floating_point_formats_alone():
    assert torch.int8 not in {*stored_dtypes(), *compute_dtypes(), *half_dtypes()}
    assert low_precision_formats() == ("fp16", "bf16", "fp8")
    assert region_formats() == ("fp64", "fp32", "bf16", "fp16")


def test_the_table_says_what_formats_are_used_for():
    assert compute_formats() == ("fp64", "fp32", "bf16", "fp16", "fp8", "int8")
    assert param_formats() == ("fp64", "fp32", "bf16", "fp16")
    assert half_dtypes() == (torch.bfloat16, torch.float16)
    assert [name for name in FORMATS if get_format(name).use.needs_scaling] == ["fp16", "e4m3", "e5m2"]
    assert [name for name in FORMATS if get_format(name).use.scales_itself] == ["fp8", "int8"]
    assert [name for name in FORMATS if get_format(name).is_half] == ["bf16", "fp16"]
    assert [name for name in FORMATS if get_format(name).is_coarse] == ["bf16", "fp8", "e4m3", "e5m2", "int8"]


@pytest.mark.parametrize("name", FORMATS)
def test_promotions_lead_to_formats_that_layers_compute_in_and_end_in_fp64(name):
    for reason in ("for_range", "for_precision"):
        wider = getattr(get_format(name).use, reason)
        if name == "fp64":
            assert wider is None
        else:
            assert get_format(wider).use.is_computed_in
            assert is_wider(wider, name)


def test_a_promotion_for_range_holds_the_number():
    assert [promoted_for_range(name) for name in FORMATS] == [None, "fp64", "fp32", *["bf16"] * 5]
    assert promoted_for_range("fp16", 1e5) == "bf16"
    assert promoted_for_range("fp16", 3.4e38) == "fp32"
    assert promoted_for_range("fp16", 1e39) == "fp64"
    assert promoted_for_range("fp16", math.inf) is None
    assert promoted_for_range("fp16", math.nan) is None


@pytest.mark.parametrize(
    ("precision", "format"),
    [
        ("16-mixed", "fp16"),
        ("bf16-true", "bf16"),
        ("32-true", "fp32"),
        ("64-true", "fp64"),
        ("transformer-engine", None),
    ],
)
def test_what_a_trainers_precision_trains_in(precision, format):
    assert trained_in(precision) == format


def test_a_plain_format_is_its_own_forward_and_backward():
    assert get_format("bf16").forward is get_format("bf16").backward is get_format("bf16")


def test_formats_cannot_be_changed():
    with pytest.raises(AttributeError):
        get_format("fp16").mantissa_bits = 3


@pytest.mark.parametrize("inner", ORACLE)
@pytest.mark.parametrize("outer", ORACLE)
def test_contains_means_that_every_number_survives_the_cast(outer, inner):
    if get_format(inner).bits > 16:
        expected = get_format(outer).bits >= get_format(inner).bits
    else:
        codes = np.arange(2 ** get_format(inner).bits, dtype=f"u{get_format(inner).bits // 8}").view(ORACLE[inner])
        with np.errstate(over="ignore", invalid="ignore"):
            values = codes.astype(np.float64)
            expected = np.array_equal(values, values.astype(ORACLE[outer]).astype(np.float64), equal_nan=True)
    assert get_format(outer).contains(get_format(inner)) is expected


def test_contains_minds_the_meaning_of_the_largest_exponent():
    e4m3, like_ieee = get_format("e4m3"), Format("e4m3 with infinity", 4, 3, "inf", torch.float16)
    assert like_ieee.max == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3).max) == 240
    assert not e4m3.contains(like_ieee)
    assert not like_ieee.contains(e4m3)


@pytest.mark.parametrize(("name", "dtype"), DTYPE.items())
def test_format_of_a_dtype(name, dtype):
    assert format_of(dtype) == name


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fnuz])
def test_format_of_a_dtype_outside_the_table(dtype):
    assert format_of(dtype) is None


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("float16", "fp16"),
        ("half", "fp16"),
        ("16-mixed", "fp16"),
        ("16-true", "fp16"),
        (16, "fp16"),
        ("FP16", "fp16"),
        ("f16", "fp16"),
        (torch.float16, "fp16"),
        ("bfloat16", "bf16"),
        ("bf16-mixed", "bf16"),
        ("bf-16", None),
        ("torch.bfloat16", "bf16"),
        ("float32", "fp32"),
        ("32-true", "fp32"),
        (32, "fp32"),
        ("double", "fp64"),
        (torch.float64, "fp64"),
        ("fp8_e4m3", "e4m3"),
        ("float8_e5m2", "e5m2"),
        (torch.float8_e4m3fn, "e4m3"),
        ("float8", "fp8"),
        ("int32", None),
        ("INT8", "int8"),
        (torch.int8, "int8"),
        ("", None),
        (None, None),
        (True, None),
        (["fp16"], None),
        (torch.int64, None),
    ],
)
def test_an_unknown_format_is_answered_in_one_line_with_what_was_meant(wrong, meant):
    with pytest.raises(FormatError) as caught:
        get_format(wrong)
    message = str(caught.value)
    assert repr(wrong) in message
    assert "\n" not in message
    assert message.endswith("the formats are fp64, fp32, bf16, fp16, fp8, e4m3, e5m2, int8")
    assert ("did you mean" in message) is (meant is not None)
    assert meant is None or f"did you mean '{meant}'?" in message


def test_format_errors_are_the_packages_errors():
    assert issubclass(FormatError, MixPrecError)
    assert issubclass(MixPrecError, ValueError)


def test_a_format_is_only_its_definition_and_its_use():
    definition = {"name", "exponent_bits", "mantissa_bits", "overflow", "dtype", "use", "parts"}
    assert set(Format.__dataclass_fields__) == definition
