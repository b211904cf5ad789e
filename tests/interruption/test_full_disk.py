"""Disks that are full and directories that are none: one warning, nothing half written, and the run goes on."""

import contextlib
import errno
import json
import os
import resource
import threading
import warnings
from pathlib import Path

import pytest
import torch
from interruption.runs import LEARNED, differences, ending, trained

from lightning_mixprec import PrecisionPolicy
from lightning_mixprec.evidence.saved_batches import save_batch
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.records.journal import FILE_NAME, Journal

WIDE = PrecisionPolicy.from_dict({"default": "fp16", **{f"net.{number}": "fp32" for number in range(100)}})


@contextlib.contextmanager
def room_for(size):
    """No file may become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def warned_of(caught, name):
    return [str(each.message) for each in caught if name in str(each.message)]


def run(folder, **options):
    """What a run ends with, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end = ending(*trained(folder, **options))
    return end, caught


@pytest.fixture(scope="module")
def unhampered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unhampered")
    return run(folder)[0], folder


def fills(monkeypatch, after):
    """The disk is full when the learned policy has been written that many times."""
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)


def same_but_for_the_warning(end, expected):
    end["monitors"]["AdaptivePrecision"]["warned"].remove("file")
    return list(differences(end, expected)) == []


def test_a_run_whose_log_directory_is_a_file_warns_of_each_file_once_and_trains_as_ever(unhampered, tmp_path):
    (tmp_path / "logs").write_text("not a directory")
    end, caught = run(tmp_path, default_root_dir=tmp_path / "logs")
    assert len(warned_of(caught, FILE_NAME)) == 1
    assert len(warned_of(caught, LEARNED)) == 1
    assert same_but_for_the_warning(end, unhampered[0])
    assert (tmp_path / "logs").read_text() == "not a directory"


def test_a_run_whose_disk_fills_keeps_the_last_learned_policy_and_trains_as_ever(unhampered, tmp_path, monkeypatch):
    fills(monkeypatch, after=2)
    end, caught = run(tmp_path)
    assert len(warned_of(caught, LEARNED)) == 1
    assert same_but_for_the_warning(end, unhampered[0])
    first = torch.load(tmp_path / "saved" / "epoch=0.ckpt", weights_only=True)["PerLayerPrecision"]["policy"]
    assert PrecisionPolicy.from_file(tmp_path / LEARNED).to_dict() == first != end["plugin"]["policy"]
    assert {path.name for path in tmp_path.iterdir()} == {LEARNED, FILE_NAME, "saved"}


def test_a_run_whose_file_of_rows_fills_warns_once_and_keeps_whole_rows(unhampered, tmp_path, monkeypatch):
    write, expected = Path.open, (unhampered[1] / FILE_NAME).read_text()

    def full(path, mode="r", *args, **options):
        file = write(path, mode, *args, **options)
        if path.name == FILE_NAME and mode == "a":
            put = file.write
            file.write = lambda text: put(text) if path.stat().st_size < 20_000 else fail(file, put, text)
        return file

    def fail(file, put, text):
        put(text[: len(text) // 2])
        file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    end, caught = run(tmp_path)
    assert len(warned_of(caught, FILE_NAME)) == 1
    assert list(differences(end, unhampered[0])) == []
    found = (tmp_path / FILE_NAME).read_text()
    assert 20_000 <= len(found) < len(expected)
    assert rows(expected)[: len(rows(found))] == rows(found)
    assert found.endswith("\n")


def rows(text):
    """The rows of a file, without the run that they are of."""
    return [{key: value for key, value in json.loads(line).items() if key != "run_id"} for line in text.splitlines()]


@pytest.mark.parametrize("before", [0, 1])
def test_rows_that_do_not_fit_are_not_in_the_file_by_halves(before):
    journal = Journal(".")
    for number in range(before):
        journal.write(number=number)
    journal.flush()
    journal.write(text="x" * 100)
    with room_for(60), pytest.warns(UserWarning, match="the run goes on without per-layer rows"):
        journal.flush()
    assert [json.loads(line) for line in Path(FILE_NAME).read_text().splitlines()] == [{"number": 0}] * before
    journal.write(number=2)
    journal.flush()  # warns of nothing more


def test_a_policy_that_does_not_fit_leaves_the_one_that_is_there():
    PrecisionPolicy("bf16").to_file("policy.yaml")
    with room_for(200), pytest.raises(OSError, match="File too large"):
        WIDE.to_file("policy.yaml")
    assert os.listdir() == ["policy.yaml"]
    assert PrecisionPolicy.from_file("policy.yaml") == PrecisionPolicy("bf16")


def test_a_batch_that_does_not_fit_leaves_no_file():
    kept = KeptBatch(torch.zeros(10_000), 0, None)
    with room_for(2000), pytest.warns(UserWarning, match=r"the batch could not be saved to .*batch\.pt"):
        assert save_batch(Path("folder/batch.pt"), kept, {"loss_scale": 1.0}, "fp16") is None
    assert os.listdir("folder") == []


def test_a_pipe_or_a_device_is_written_to_and_not_replaced():
    """As root, a policy written through a link to a device would otherwise take the device's place."""
    os.mkfifo("pipe")
    os.symlink("pipe", "policy.yaml")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    PrecisionPolicy("fp16").to_file("policy.yaml")
    reader.join(timeout=10)
    assert read == ["default: fp16\nrules: []\n"]
    assert sorted(os.listdir()) == ["pipe", "policy.yaml"]
    assert Path("pipe").is_fifo()
