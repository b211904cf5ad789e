"""The table of named devices, against what follows from their makers' clocks, units and buses; and the command."""

import subprocess
import sys

import pytest
import torch

from lightning_mixprec.errors import FormatError, SupportError
from lightning_mixprec.numerics.devices import DEVICES, NamedDevice, named_device, native_support
from lightning_mixprec.numerics.devices.__main__ import main
from lightning_mixprec.numerics.formats import FORMATS

GPUS = [device for device in DEVICES if device.name != "cpu"]

# Multiprocessors, dense 16-bit operations of each in a clock, boost clock of tensor cores in GHz; bits of the memory
# bus and Gbit/s of each. The boards of the NVL variants are held below the boost clock by their power.
HARDWARE = {
    "V100 SXM2 32GB": ((80, 1024, 1.53), (4096, 1.752)),
    "V100 SXM2 16GB": ((80, 1024, 1.53), (4096, 1.752)),
    "V100 PCIe 32GB": ((80, 1024, 1.38), (4096, 1.752)),
    "V100 PCIe 16GB": ((80, 1024, 1.38), (4096, 1.752)),
    "T4": ((40, 1024, 1.59), (256, 10.0)),
    "A100 SXM 80GB": ((108, 2048, 1.41), (5120, 3.186)),
    "A100 SXM 40GB": ((108, 2048, 1.41), (5120, 2.43)),
    "A100 PCIe 80GB": ((108, 2048, 1.41), (5120, 3.024)),
    "A100 PCIe 40GB": ((108, 2048, 1.41), (5120, 2.43)),
    "L40S": ((142, 1024, 2.52), (384, 18.0)),
    "H100 SXM 80GB": ((132, 4096, 1.83), (5120, 5.23)),
    "H100 PCIe 80GB": ((114, 4096, 1.62), (5120, 3.19)),
    "H100 NVL 94GB": (None, (6016, 5.23)),
    "H200 SXM 141GB": ((132, 4096, 1.83), (6144, 6.25)),
    "H200 NVL 141GB": (None, (6144, 6.25)),
    "B200 SXM 180GB": ((148, 8192, 1.86), (7680, 7.992)),
}


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_peaks_follow_from_units_and_clocks(device):
    compute, (bits, rate) = HARDWARE[device.name]
    if compute is not None:
        units, operations, clock = compute
        assert device.tflops["fp16"] == pytest.approx(units * operations * clock / 1e3, rel=0.02)
    assert device.bandwidth_gb_s == pytest.approx(bits / 8 * rate, rel=0.05)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_peaks_are_dense_and_in_proportion(device):
    """Sparsity doubles what tensor cores claim: with it anywhere, these proportions would be 2 or 4."""
    peaks, half = device.tflops, device.tflops["fp16"]
    if "bf16" in peaks:
        assert peaks["bf16"] == half
        assert device.tf32_tflops / half == pytest.approx(1 / 2, rel=0.03)
    else:
        assert device.tf32_tflops is None
    for name in {"fp8", "int8"} & peaks.keys():
        assert peaks[name] / half == pytest.approx(2, rel=0.02)
    assert peaks["fp32"] < half


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_what_has_a_peak_is_native_and_what_is_native_has_a_peak(device):
    """The maker says nothing of fp64 for GPUs that have little of it; e4m3 and e5m2 are the parts of fp8."""
    native = set(device.formats) - {"e4m3", "e5m2"}
    peaks = {name for name in device.tflops if name in FORMATS}
    assert native - {"fp64"} <= peaks <= native


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_row_is_whole(device):
    assert device.source
    assert hash(device) == hash(named_device(device.name))
    assert named_device(device.name) is device
    assert named_device(device.name.upper()) is device
    if device in GPUS:
        assert device.address.startswith("https://")
        assert 10 <= device.memory_gib <= 200
        assert device.compute_capability >= (7, 0)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a100", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("a100 pcie", "A100 PCIe 80GB"),
        ("v100", "V100 SXM2 32GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2 16GB"),
        ("Tesla V100-PCIE-32GB", "V100 PCIe 32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("H100", "H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA H100 NVL", "H100 NVL 94GB"),
        ("NVIDIA H200", "H200 SXM 141GB"),
        ("NVIDIA H200 NVL", "H200 NVL 141GB"),
        ("NVIDIA B200", "B200 SXM 180GB"),
        ("CPU", "cpu"),
    ],
)
def test_devices_are_found_by_the_names_that_torch_gives_them(name, found):
    assert named_device(name).name == found


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("h10", "h100"),
        ("L40", "l40s"),
        ("NVIDIA GH200 480GB", "h200"),
        ("A100 41GB", "a100"),
        # A slice of a GPU computes and holds less than all of it.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100"),
        ("NVIDIA GeForce RTX 4090", None),
        ("nvidia", None),
        ("", None),
        (None, None),
        (("a100",), "a100"),
    ],
)
def test_another_device_is_one_line_with_near_misses(name, meant):
    with pytest.raises(SupportError) as caught:
        named_device(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{name!r} is not in the table of devices")
    assert message.endswith("its models are cpu, v100, t4, a100, l40s, h100, h200, b200")
    assert (f"did you mean {meant!r}?" in message) if meant else ("did you mean" not in message)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_it_computes_natively_what_the_same_gpu_would_here(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: device.compute_capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: device.name)
    for name in FORMATS:
        assert device.support(name) == native_support(name, "cuda")


def test_the_cpu_is_the_one_at_hand_and_unmeasured():
    cpu = named_device("cpu")
    assert all(cpu.support(name) == native_support(name, "cpu") for name in FORMATS)
    assert cpu == NamedDevice(name="cpu", source=cpu.source)
    assert not cpu.tflops
    assert cpu.bandwidth_gb_s is cpu.memory_gib is cpu.tf32_tflops is None


def test_support_of_an_unknown_format():
    for name in ("cpu", "a100"):
        with pytest.raises(FormatError, match="did you mean 'bf16'"):
            named_device(name).support("bfloat16")


# python -m lightning_mixprec.numerics.devices


def rows(lines):
    """The rows of one table, format -> (yes or no, reason)."""
    start = next(index for index, line in enumerate(lines) if line.split() == ["format", "native", "reason"])
    table = [line.split(maxsplit=2) for line in lines[start + 1 :]]
    return {row[0]: tuple(row[1:]) for row in table}


def said_of(device):
    answers = {name: native_support(name, device) for name in FORMATS if name not in ("e4m3", "e5m2")}
    return {name: ("yes" if answer.native else "no", answer.reason) for name, answer in answers.items()}


def test_it_prints_what_this_machine_computes(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([]) == 0
    version, cpu, cuda = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert version == f"torch {torch.__version__}"
    assert cpu.startswith("cpu: ")
    assert f"threads: {torch.get_num_threads()}" in cpu
    assert rows(cpu.splitlines()) == said_of("cpu")
    assert cuda == "cuda: torch sees no CUDA device"


def test_it_prints_a_table_for_each_gpu(monkeypatch, capsys):
    gpus = [("Tesla T4", (7, 5)), ("NVIDIA H200", (9, 0))]

    def gpu(device):
        return gpus[device if isinstance(device, int) else device.index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu(device)[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu(device)[1])
    assert main([]) == 0
    _, _, first, second = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert first.startswith("cuda:0: Tesla T4\n")
    assert second.startswith("cuda:1: NVIDIA H200\n")
    assert rows(first.splitlines()) == said_of("cuda:0")
    assert rows(second.splitlines()) == said_of("cuda:1")
    assert rows(first.splitlines())["bf16"][0] == "no"
    assert rows(second.splitlines())["fp8"][0] == "yes"


def test_the_columns_are_aligned(capsys):
    main([])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    for column in (table[0].index("native"), table[0].index("reason")):
        assert all(line[column - 1] == " " != line[column] for line in table)


def test_a_wrong_argument_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--all"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --all" in capsys.readouterr().err


def test_the_module_runs_by_its_name_without_a_warning():
    """Python warns of a module that is imported before it is run; a process of its own, seconds to import torch."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "lightning_mixprec.numerics.devices"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout.split("\n\n")[1].splitlines()).keys() == said_of("cpu").keys()
