"""What devices compute natively: this machine by its kernel's account, others by what torch would say of them."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from selection import slow_but_for

from lightning_mixprec.errors import FormatError, SupportError
from lightning_mixprec.numerics.devices import native_support, timing
from lightning_mixprec.numerics.devices.cpu import cpu_support
from lightning_mixprec.numerics.devices.timing import judged, product_cost
from lightning_mixprec.numerics.formats import FORMATS, get_format

DTYPE = {name: format.dtype for name, format in FORMATS.items()}


# GPUs


class FakeGPU:
    """Answers as torch.cuda does on a machine with GPUs of one model."""

    def __init__(self, monkeypatch, capability, name="Fake GPU", count=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


class FakeAMD(FakeGPU):
    """Answers as torch.cuda does on a machine with an AMD GPU."""

    gcnArchName = "unknown"

    def __init__(self, monkeypatch, target, name):
        super().__init__(monkeypatch, (9, 0), name)
        self.gcnArchName = target
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: self)


WIDE = {"fp64", "fp32"}
HALVES = {"fp16", "bf16"}
FP8 = {"fp8", "e4m3", "e5m2"}


@pytest.mark.parametrize(
    ("gpu", "capability", "native"),
    [
        ("GeForce GTX 980", (5, 2), WIDE),
        ("Jetson TX1", (5, 3), {*WIDE, "fp16"}),
        ("Tesla P100-PCIE-16GB", (6, 0), {*WIDE, "fp16"}),
        ("Tesla V100-SXM2-16GB", (7, 0), {*WIDE, "fp16"}),
        ("Tesla T4", (7, 5), {*WIDE, "fp16", "int8"}),
        ("NVIDIA A100-SXM4-80GB", (8, 0), {*WIDE, *HALVES, "int8"}),
        ("NVIDIA GeForce RTX 3090", (8, 6), {*WIDE, *HALVES, "int8"}),
        ("NVIDIA L40S", (8, 9), {*WIDE, *HALVES, *FP8, "int8"}),
        ("NVIDIA H100 80GB HBM3", (9, 0), {*WIDE, *HALVES, *FP8, "int8"}),
        ("NVIDIA B200", (10, 0), {*WIDE, *HALVES, *FP8, "int8"}),
    ],
)
def test_native_formats_of_gpus(monkeypatch, gpu, capability, native):
    FakeGPU(monkeypatch, capability, gpu)
    for device in ("cuda", torch.device("cuda", 0)):
        answers = {name: native_support(name, device) for name in FORMATS}
        assert {name for name, answer in answers.items() if answer.native} == native
        assert all(gpu in answer.reason for answer in answers.values())


@pytest.mark.parametrize(
    ("format", "capability", "reason"),
    [
        ("bf16", (7, 5), "Tesla T4 (compute capability 7.5) has no bf16 arithmetic, which came with 8.0"),
        ("fp16", (5, 2), "Tesla T4 (compute capability 5.2) has no fp16 arithmetic, which came with 5.3"),
        (
            "fp16",
            (6, 1),
            "Tesla T4 (compute capability 6.1) has fp16 arithmetic, without tensor cores, which came with 7.0",
        ),
        ("fp16", (7, 5), "Tesla T4 (compute capability 7.5) has fp16 arithmetic, with tensor cores from 7.0 on"),
        ("fp8", (8, 6), "Tesla T4 (compute capability 8.6) has no fp8 arithmetic, which came with 8.9"),
        ("fp64", (7, 5), "Tesla T4 (compute capability 7.5) has fp64 arithmetic"),
    ],
)
def test_the_reason_names_the_gpu_and_what_it_has_or_lacks(monkeypatch, format, capability, reason):
    FakeGPU(monkeypatch, capability, "Tesla T4")
    assert native_support(format, "cuda:0").reason == reason


def test_no_cuda_device(monkeypatch):
    FakeGPU(monkeypatch, (9, 0), count=0)
    assert native_support("fp32", "cuda") == native_support("bf16", "cuda:3")
    assert native_support("fp32", "cuda").native is False
    assert native_support("fp32", "cuda").reason == "torch sees no CUDA device"


def test_a_cuda_device_beyond_the_last(monkeypatch):
    FakeGPU(monkeypatch, (9, 0), count=2)
    support = native_support("fp32", "cuda:2")
    assert not support.native
    assert support.reason == "there is no cuda:2, the last CUDA device is cuda:1"


@pytest.mark.parametrize(
    ("gpu", "target", "native"),
    [
        ("Radeon VII", "gfx906:sramecc-:xnack-", {*WIDE, "fp16"}),
        ("AMD Radeon RX 6900 XT", "gfx1030", {*WIDE, "fp16"}),
        ("AMD Instinct MI100", "gfx908:sramecc+:xnack-", {*WIDE, *HALVES}),
        ("AMD Instinct MI250X", "gfx90a:sramecc+:xnack-", {*WIDE, *HALVES}),
        ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", {*WIDE, *HALVES}),
        ("AMD Radeon RX 7900 XTX", "gfx1100", {*WIDE, *HALVES}),
    ],
)
def test_native_formats_of_amd_gpus(monkeypatch, gpu, target, native):
    """All of them claim compute capability 9.0 or more; torch's is_bf16_supported() is True of each."""
    FakeAMD(monkeypatch, target, gpu)
    answers = {name: native_support(name, "cuda") for name in FORMATS}
    assert {name for name, answer in answers.items() if answer.native} == native
    assert all(gpu in answer.reason for answer in answers.values())


def test_why_an_amd_gpu_does_not(monkeypatch):
    FakeAMD(monkeypatch, "gfx906:sramecc-:xnack-", "Radeon VII")
    assert native_support("bf16", "cuda").reason.startswith(
        "Radeon VII (gfx906) has no bf16 arithmetic, which gfx908*, "
    )
    assert native_support("fp8", "cuda").reason == "fp8 is supported on NVIDIA GPUs only, and this is Radeon VII"


@pytest.mark.gpu
def test_torch_agrees_on_this_gpu():
    assert native_support("bf16", "cuda").native is torch.cuda.is_bf16_supported(including_emulation=False)
    assert native_support("fp32", "cuda").native


# CPUs


class FakeCPU:
    """Answers as torch does on another CPU, on which none of oneDNN's limits is set."""

    def __init__(self, monkeypatch, architecture, has=(), lacks=()):
        self.capabilities = {"architecture": architecture, **dict.fromkeys(lacks, False), **dict.fromkeys(has, True)}
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: self.capabilities, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(timing, "product_cost", self.timed)
        self.costs = {}

    def timed(self, dtype):
        assert dtype in self.costs, f"a product in {dtype} was timed, where torch knows"
        return self.costs[dtype]


X86 = [
    *("avx2", "avx_vnni", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
]
ZEN_2 = ["avx2"]
SKYLAKE = [*ZEN_2, "avx512_f"]
ZEN_4 = [*SKYLAKE, "avx512_vnni", "avx512_bf16"]
SAPPHIRE_RAPIDS = [*ZEN_4, "avx_vnni", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"]
GRANITE_RAPIDS = [*SAPPHIRE_RAPIDS, "amx_fp16"]
ARM = ["neon", "fp16_arith", "bf16", "i8mm", "dot"]


@pytest.mark.parametrize(
    ("architecture", "has", "native", "reasons"),
    [
        (
            "x86_64",
            ZEN_2,
            set(),
            {
                "bf16": "this CPU has no AVX512-BF16 or AMX-BF16",
                "fp16": "this CPU has no AVX512-FP16 or AMX-FP16",
            },
        ),
        ("x86_64", SKYLAKE, set(), {"bf16": "this CPU has no AVX512-BF16 or AMX-BF16"}),
        ("x86_64", ZEN_4, {"bf16"}, {"bf16": "this CPU has AVX512-BF16"}),
        (
            "x86_64",
            SAPPHIRE_RAPIDS,
            HALVES,
            {"bf16": "this CPU has AVX512-BF16 and AMX-BF16", "fp16": "this CPU has AVX512-FP16"},
        ),
        ("x86_64", GRANITE_RAPIDS, HALVES, {"fp16": "this CPU has AVX512-FP16 and AMX-FP16"}),
        ("AMD64", ZEN_4, {"bf16"}, {}),
        ("arm64", ["neon"], set(), {"bf16": "this CPU has no BF16", "fp16": "this CPU has no FP16-ARITH"}),
        ("arm64", ["neon", "fp16_arith", "dot"], {"fp16"}, {"fp16": "this CPU has FP16-ARITH"}),
        ("aarch64", ARM, HALVES, {"bf16": "this CPU has BF16"}),
    ],
    ids=["Zen 2", "Skylake", "Zen 4", "Sapphire Rapids", "Granite Rapids", "Windows", "A72", "M1", "Neoverse V1"],
)
def test_native_16_bit_formats_of_other_cpus(monkeypatch, architecture, has, native, reasons):
    FakeCPU(monkeypatch, architecture, has, lacks=X86 if architecture in ("x86_64", "AMD64") else ARM)
    answers = {name: cpu_support(get_format(name)) for name in HALVES}
    assert {name for name, answer in answers.items() if answer.native} == native
    assert {name: answers[name].reason for name in reasons} == reasons


def test_wide_formats_are_native_everywhere_and_fp8_nowhere(monkeypatch):
    for architecture, has in (("x86_64", GRANITE_RAPIDS), ("arm64", ARM), ("riscv64", ())):
        FakeCPU(monkeypatch, architecture, has)
        assert all(cpu_support(get_format(name)).native for name in WIDE)
        assert not any(cpu_support(get_format(name)).native for name in FP8)


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("limit", "native"),
    [
        ("SSE41", set()),
        ("AVX2", set()),
        ("AVX2_VNNI_2", set()),
        ("avx512_core", set()),
        ("AVX512_CORE_VNNI", set()),
        ("AVX512_CORE_BF16", {"bf16"}),
        ("AVX512_CORE_FP16", HALVES),
        ("AVX10_1_512", HALVES),
        ("AVX10_1_512_AMX", HALVES),
        ("ALL", HALVES),
        ("DEFAULT", HALVES),
        ("no such thing", HALVES),
    ],
)
def test_what_onednn_may_not_use_is_not_there(monkeypatch, variable, limit, native):
    FakeCPU(monkeypatch, "x86_64", GRANITE_RAPIDS)
    monkeypatch.setenv(variable, limit)
    answers = {name: cpu_support(get_format(name)) for name in HALVES}
    assert {name for name, answer in answers.items() if answer.native} == native
    for name in HALVES - native:
        assert f"{variable}={limit} keeps torch from using it" in answers[name].reason
        assert "AVX512-" in answers[name].reason


def test_of_two_limits_onednn_reads_its_new_name(monkeypatch):
    FakeCPU(monkeypatch, "x86_64", ZEN_4)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert cpu_support(get_format("bf16")).native


@pytest.mark.parametrize(
    ("architecture", "has", "reason"),
    [
        ("x86_64", SKYLAKE, "this CPU has no AVX512-VNNI or AVX-VNNI or AMX-INT8"),
        ("x86_64", [*ZEN_2, "avx_vnni"], "this CPU has AVX-VNNI"),
        ("x86_64", ZEN_4, "this CPU has AVX512-VNNI"),
        ("x86_64", SAPPHIRE_RAPIDS, "this CPU has AVX512-VNNI and AVX-VNNI and AMX-INT8"),
        ("arm64", ["neon"], "this CPU has no DOT or I8MM"),
        ("aarch64", ["neon", "dot"], "this CPU has DOT"),
    ],
)
def test_int8_is_native_with_dot_products_of_it(monkeypatch, architecture, has, reason):
    FakeCPU(monkeypatch, architecture, has, lacks=X86 if architecture == "x86_64" else ARM)
    support = cpu_support(get_format("int8"))
    assert support.reason == reason
    assert support.native is not reason.startswith("this CPU has no")


def test_a_format_planted_in_the_table_is_answered_for(monkeypatch):
    FakeCPU(monkeypatch, "x86_64", ["avx2", "new_8"], lacks=X86)
    bf16 = get_format("bf16")
    planted = replace(bf16, name="new", use=replace(bf16.use, x86_features=("new_8", "avx512_bf16")))
    assert cpu_support(planted).reason == "this CPU has NEW-8"


# CPUs that torch does not know


@pytest.mark.parametrize(
    ("cost", "native"), [(0.3, True), (0.8, True), (1.5, True), (1.6, False), (2.5, False), (40.0, False)]
)
def test_an_unknown_architecture_is_judged_by_a_timed_product(monkeypatch, cost, native):
    cpu = FakeCPU(monkeypatch, "riscv64")
    cpu.costs = {torch.bfloat16: cost, torch.float16: None}
    assert cpu_support(get_format("bf16")) == judged("bf16", cost)
    assert cpu_support(get_format("bf16")).native is native
    assert f"a product in bf16 took {cost:.1f} times as long as in fp32" in cpu_support(get_format("bf16")).reason
    assert cpu_support(get_format("fp16")).reason == "torch has no product in fp16 on this CPU"
    assert not cpu_support(get_format("fp16")).native


def test_without_onednn_instruction_sets_prove_nothing(monkeypatch):
    cpu = FakeCPU(monkeypatch, "x86_64", ZEN_4, lacks=X86)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    cpu.costs = {torch.bfloat16: 30.0}
    assert not cpu_support(get_format("bf16")).native


@pytest.mark.parametrize("lacks", [(), ("avx512_bf16",), ("amx_bf16",)])
def test_a_feature_that_torch_does_not_mention_may_be_there(monkeypatch, lacks):
    cpu = FakeCPU(monkeypatch, "x86_64", lacks=lacks)
    cpu.costs = {torch.bfloat16: 0.6}
    assert cpu_support(get_format("bf16")).native
    cpu.costs = {torch.bfloat16: 24.0}
    assert not cpu_support(get_format("bf16")).native


def test_a_product_is_timed_best_of_several_and_once(monkeypatch):
    """The clock runs by what each product is said to take, with noise that only ever adds."""
    clock, noise = [0.0], iter([9.0, 9.0, 0.0, 5.0, 3.0, 0.0, 7.0, 7.0, 0.5, 0.5, 2.0, 2.0])
    calls = []

    def multiply(one, other):
        assert torch.get_num_threads() == 1
        calls.append(one.dtype)
        clock[0] += (1.0 if one.dtype == torch.float32 else 4.0) + next(noise)

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(timing.time, "thread_time", lambda: clock[0])
    product_cost.cache_clear()
    assert product_cost(torch.float16) == product_cost(torch.float16) == 4.0
    assert calls == [torch.float32, torch.float16] * 6
    product_cost.cache_clear()


def test_timing_leaves_no_trace_and_no_surroundings_change_it():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    product_cost.cache_clear()
    try:
        torch.set_num_threads(threads + 1)
        with torch.autocast("cpu", torch.float16), torch.device("meta"):
            assert product_cost(torch.float64) is not None
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
        product_cost.cache_clear()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_torch_cannot_multiply_costs_nothing_that_could_be_told():
    product_cost.cache_clear()
    assert product_cost(torch.bool) is None
    product_cost.cache_clear()


# This machine


def flags():
    """What the kernel says of this CPU, which torch is not asked for."""
    path = Path("/proc/cpuinfo")
    if not path.exists() or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("this system does not list its CPU's features in /proc/cpuinfo")
    words = (line.partition(":") for line in path.read_text().splitlines())
    return next(set(value.split()) for key, _, value in words if key.strip().lower() in ("flags", "features"))


@pytest.mark.skipif(
    any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")), reason="oneDNN is limited here"
)
@pytest.mark.parametrize(
    ("format", "x86", "arm"),
    [("bf16", {"avx512_bf16", "amx_bf16"}, {"bf16"}), ("fp16", {"avx512_fp16", "amx_fp16"}, {"asimdhp"})],
)
def test_the_kernel_says_the_same_of_this_cpu(format, x86, arm):
    known = x86 if platform.machine() == "x86_64" else arm
    assert native_support(format, "cpu").native is bool(flags() & known)
    assert native_support(format, "cpu") == cpu_support(get_format(format))


ASK = """
import torch
print(torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's own answer is about x86")
@pytest.mark.parametrize(
    "limit", slow_but_for(["AVX2"], ["ALL", "SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX10_1_512"])
)
def test_onednn_itself_agrees_under_every_limit(monkeypatch, limit):
    """It says of fp16 what we say, and of bf16 yes already where it converts with AVX-512, so ours implies its own.

    It is asked in a process of its own, because it reads the limit once: seconds, all of them to import torch.
    """
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, timeout=120)
    bf16, fp16 = (answer == "True" for answer in asked.stdout.split())
    assert cpu_support(get_format("fp16")).native is fp16
    assert bf16 or not cpu_support(get_format("bf16")).native


def test_int8_products_are_exact_where_they_are_native():
    """Without the instructions that the rule asks for, oneDNN adds pairs of products up in 16 bits, which saturate."""
    if not native_support("int8", "cpu").native:
        pytest.skip("this CPU has no arithmetic for int8")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (256, 256), dtype=torch.int8, generator=generator) for _ in range(2))
    a[0], b[:, 0] = -128, -128
    assert torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double())


# Questions that are none


@pytest.mark.parametrize("device", ["mps", "xla", "meta"])
def test_other_devices_are_not_supported(device):
    support = native_support("fp32", device)
    assert not support.native
    assert device in support.reason
    assert "cuda and cpu" in support.reason


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", None, 1.5])
def test_no_device_at_all(device):
    with pytest.raises(SupportError, match="is no device") as caught:
        native_support("fp32", device)
    assert "\n" not in str(caught.value)


def test_support_of_an_unknown_format():
    with pytest.raises(FormatError, match="did you mean 'bf16'"):
        native_support("bfloat16", "cpu")


@pytest.mark.parametrize("name", ["fp64", "fp32", "bf16", "fp16"])
def test_torch_computes_in_the_formats_of_a_cpu_native_or_not(name):
    matrix = torch.ones(2, 2, dtype=DTYPE[name])
    assert (matrix @ matrix + matrix).tolist() == [[3, 3], [3, 3]]
