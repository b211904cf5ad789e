"""What FSDP2 gathers a model's weights in, in a world of one process."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sharded_models import Stack
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.sharding import shard
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

BY_BLOCK = {"default": "bf16", "blocks.1": "fp32", "head": "fp32"}


@pytest.fixture(autouse=True)
def _world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resolved(model, policy="bf16"):
    return PrecisionPolicy.from_dict(policy if isinstance(policy, dict) else {"default": policy}).resolve(model)


def computed(model, policy, x, modules=None, **options):
    """What a model computes under a policy, sharded if modules are given."""
    if modules is not None:
        shard(model, modules, resolved(model, policy), **options)
    attachment = attach(model, resolved(model, policy), "cpu")
    with attachment.context():
        result = model(x)
    attachment.detach()
    return result


def seeded(make):
    torch.manual_seed(0)
    return make()


def stored(model):
    return {name: module._get_fsdp_state()._mp_policy for name, module in model.named_modules() if is_sharded(module)}


def is_sharded(module):
    return isinstance(module, FSDPModule)


def trained(model, policy, x):
    """The losses of two backwards, whose gradients add up."""
    attachment, losses = attach(model, resolved(model, policy), "cpu"), []
    for _ in range(2):
        with attachment.context():
            loss = model(x).float().square().sum()
        loss.backward()
        losses.append(loss.item())
    attachment.detach()
    return losses


class Read(nn.Module):
    """A loss that reads the head's weights without calling the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return F.linear(self.embed(x), self.head.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner = norm(nn.Linear(6, 4))

    def forward(self, x):
        return self.inner(x)


def test_layers_that_autocast_does_not_cast_are_gathered_apart_as_they_are_stored():
    model = seeded(Stack)
    shard(model, [*model.blocks, model], resolved(model))
    found = {name: policy.param_dtype for name, policy in stored(model).items()}
    bf16 = torch.bfloat16
    expected = {"": bf16, "blocks.0": bf16, "blocks.0.norm": None, "blocks.1": bf16, "blocks.1.norm": None}
    assert found == expected


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_weights_that_hooks_compute_are_gathered_as_they_are_stored(norm):
    x, make = torch.randn(3, 6), lambda: Normed(norm)
    model = seeded(make)
    assert torch.equal(computed(model, "bf16", x, [model]), computed(seeded(make), "bf16", x))


def test_a_layer_whose_weights_are_read_without_a_call_stays_with_its_module_if_asked():
    x, model = torch.arange(5), seeded(Read)
    assert torch.equal(computed(model, "bf16", x, [model], apart=False), computed(seeded(Read), "bf16", x))


def test_layers_that_share_a_weight_stay_together():
    x, model = torch.arange(5), seeded(Tied)
    assert torch.equal(computed(model, "bf16", x, [model]), computed(seeded(Tied), "bf16", x))


def test_a_wrapped_block_can_be_sharded():
    x, model = torch.randn(3, 6), seeded(Stack)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    result = computed(model, {"default": "bf16", "blocks.*.norm": "fp32"}, x, [*model.blocks, model])
    expected = computed(seeded(Stack), {"default": "bf16", "blocks.*.norm": "fp32"}, x)
    assert all(map(is_sharded, model.blocks))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("policy", ["bf16", {"default": "fp16", "blocks.*.norm": "c=fp32,o=input"}, BY_BLOCK], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_activation_checkpointing_recomputes_norms_that_are_groups_of_their_own(policy, inside):
    """Whether a block is called within what is recomputed, or recomputes within its call."""
    x, expected, found = torch.randn(3, 6), seeded(Stack), seeded(Stack)
    if inside:
        for block in found.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    else:
        found.recomputes = True
    shard(found, [*found.blocks, found], resolved(found, policy))
    assert is_sharded(found.blocks[0].norm)
    ran = []
    found.blocks[0].norm.register_forward_hook(lambda *_: ran.append(1))
    losses = [trained(model, policy, x) for model in (expected, found)]
    assert len(ran) == 4
    assert losses[0] == losses[1]
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad.full_tensor())


@pytest.mark.parametrize("by_user", [True, False])
def test_afterwards_the_model_computes_as_it_is_stored(by_user):
    x, model = torch.randn(3, 6), seeded(Stack)
    expected = model(x)
    for part in (*model.blocks, model):
        if by_user:
            fully_shard(part)
        else:
            shard(model, [part], resolved(model))
    computed(model, "bf16", x)
    assert torch.equal(model(x), expected)


def test_a_policy_of_the_users_own_is_left():
    model = nn.Sequential(nn.Linear(6, 4))
    own = MixedPrecisionPolicy(reduce_dtype=torch.float64)
    fully_shard(model, mp_policy=own)
    computed(model, "bf16", torch.randn(3, 6))
    assert stored(model)[""] is own


def test_a_change_that_a_users_own_policy_forbids_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    fully_shard(model[0])
    fully_shard(model[1], mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))
    attachment = attach(model, resolved(model, "bf16"), "cpu")
    before = stored(model)
    with pytest.raises(PolicyError, match="layer '1' were sharded with"):
        attachment.change(resolved(model, "fp32"))
    assert stored(model) == before
    attachment.detach()


def test_a_move_keeps_gradients_that_are_not_reduced_yet():
    wide, low = (SimpleNamespace(param="fp32", compute=name, output=None) for name in ("fp32", "bf16"))
    model, x = nn.Sequential(nn.Linear(2, 1, bias=False)), torch.ones(1, 2)
    fully_shard(model)
    attachment = attach(model, {"": wide, "0": wide}, "cpu")
    model.set_requires_gradient_sync(False)
    model(x).sum().backward()
    attachment.change({"": low, "0": low})
    model.set_requires_gradient_sync(True)
    with attachment.context():
        model(x).float().sum().backward()
    assert model[0].weight.grad.full_tensor().tolist() == [[2.0, 2.0]]
    attachment.detach()
