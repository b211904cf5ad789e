"""Networks of other people's making train under our plugin and monitors as they do without.

Needs the packages of the extra ``zoo``; ``MIXPREC_ZOO_PART=3/8`` takes every eighth network, beginning with the third.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from zoo_models import ANIMALS
from zoo_runs import STEPS, caught, differences, middle, run

from lightning_mixprec import FidelityMonitor, LossScaling, OverflowMonitor, PerLayerPrecision, UnderflowMonitor
from lightning_mixprec.records.journal import FILE_NAME

pytestmark = [pytest.mark.slow, pytest.mark.zoo]

_PART, _OF = (int(number) for number in os.environ.get("MIXPREC_ZOO_PART", "1/1").split("/"))
every_animal = pytest.mark.parametrize("name", list(ANIMALS)[_PART - 1 :: _OF])


@every_animal
def test_uniform_bf16_is_lightnings_to_the_last_bit(name, tmp_path):
    stock = run(name, tmp_path, precision="bf16-mixed")
    ours = run(name, tmp_path, plugins=PerLayerPrecision("bf16"))
    assert differences(stock, ours) == []


@every_animal
def test_a_part_in_fp32_inside_bf16_computes_as_if_written_so_by_hand(name, tmp_path):
    part = middle(caught(name).network)
    by_hand = run(name, tmp_path, precision="bf16-mixed", wide=part)
    ours = run(name, tmp_path, plugins=PerLayerPrecision({"default": "bf16", part: "fp32"}))
    assert differences(by_hand, ours) == []


@every_animal
def test_monitors_change_no_bit_of_an_fp16_run_and_see_every_step(name, tmp_path):
    def trained(folder, callbacks):
        plugin = PerLayerPrecision("fp16", loss_scaling=LossScaling(init_scale=1024.0))
        return run(name, folder, plugins=plugin, callbacks=callbacks)

    monitors = [OverflowMonitor(), UnderflowMonitor(every_n_steps=1), FidelityMonitor(every_n_steps=1)]
    bare = trained(tmp_path / "bare", [])
    watched = trained(tmp_path / "watched", monitors)
    assert differences(bare, watched) == []
    rows = [json.loads(row) for path in Path(tmp_path).rglob(FILE_NAME) for row in path.read_text().splitlines()]
    assert [row["problem"] for row in rows if row.get("problem")] == []
    seen = {row["step"] for row in rows if row.get("monitor") == "fidelity" and "loss_gap" in row}
    assert seen == set(range(STEPS))


@every_animal
def test_compiled_it_computes_what_the_uncompiled_run_does(name, tmp_path):
    # Dynamo's backend "eager" leaves backward to autograd, outside autocast, as it is without a compiler.
    try:
        stock = run(name, tmp_path, precision="bf16-mixed", compile_with="eager")
    except Exception as error:
        pytest.skip(f"torch {torch.__version__} does not compile it under Lightning's plugin: {str(error)[:200]}")
    ours = run(name, tmp_path, plugins=PerLayerPrecision("bf16"), compile_with="aot_eager")
    assert differences(stock, ours) == []
