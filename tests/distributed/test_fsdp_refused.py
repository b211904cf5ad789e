"""What cannot be under FSDP1 and FSDP2 is refused in one line, on both ranks."""

from pathlib import Path

import pytest
from processes import saved_by_two

pytestmark = pytest.mark.slow

REFUSED = {
    "fsdp2 own policy": "layer 'model.stem' were sharded with MixedPrecisionPolicy(param_dtype=torch.bfloat16)",
    "fsdp2 stored": "is to store its weights in torch.float64, but they are sharded in torch.float32",
    "fsdp1 gathered wrong": "gathers the weights of layer 'model.2' in bf16, but it is to compute in fp32",
    "fsdp1 gathered and moved": "gathers the weights of layer 'model.2' in bf16, but it is to compute in fp32",
    "fsdp1 plain plugin": "The FSDP strategy can only work with the `FSDPPrecision` plugin",
    "fsdp1 under ddp": "PerLayerFSDPPrecision is for FSDPStrategy alone, and this Trainer has a DDPStrategy",
    "fsdp1 fp64": "layer 'model.head' stores its weights in fp32 and computes in fp64",
    "fsdp1 by hand": "manual optimization",
    "fsdp1 watched": "OverflowMonitor replays steps on each rank by itself, which OnTheCPU does not allow",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "fsdp_refused_script.py", tmp_path_factory.mktemp("refused"))


def test_all_was_tried(ranks):
    assert all(errors.keys() == REFUSED.keys() for errors in ranks)


@pytest.mark.parametrize(("case", "says"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_is_one_line(ranks, case, says):
    for errors in ranks:
        assert says in errors[case]
        assert "\n" not in errors[case]
