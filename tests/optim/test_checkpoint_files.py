"""The full weights from a file alone: those that the model and its optimizers give together, or one line why not."""

import pytest
import torch
from torch import nn

from lightning_mixprec import MixPrecError
from lightning_mixprec.optim import SGD, AdamW, fp32_state_dict, full_weights

WORDS = ("exact", "kahan", "stochastic", "nearest")


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.two.weight = nn.Parameter(self.one.weight.detach().t().contiguous())
        self.tied = self.two
        self.one.to(dtype), self.two.to(dtype)

    def forward(self, x):
        x = self.norm(self.one(x.to(self.one.weight.dtype)).float())
        return self.two(x.to(self.two.weight.dtype)).float()


def trained(model, *optimizers):
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def checkpoint(path, model, *optimizers):
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [each.state_dict() for each in optimizers]}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("word", WORDS)
def test_a_file_has_what_model_and_optimizers_have(tmp_path, word, dtype):
    model = Net(dtype)
    named = dict(model.named_parameters())
    late = {name: named.pop(name) for name in ("two.weight", "norm.bias")}
    one = AdamW([{"params": list(late.items())}], lr=1e-2, weights=word)
    two = SGD(list(named.items()), lr=1e-2, momentum=0.9, weights=word)
    trained(model, one, two)
    found = full_weights(checkpoint(tmp_path / "last.ckpt", model, one, two))
    expected = fp32_state_dict(model, [one, two])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["one.weight"].dtype == torch.float32
    assert torch.equal(found["tied.weight"], found["two.weight"])
    if word == "exact":
        assert not torch.equal(found["one.weight"], model.one.weight.float())
    Net(torch.float32).load_state_dict(found)


def test_weights_in_fp32_are_copies_of_themselves(tmp_path):
    model = Net(torch.float32)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    trained(model, optimizer)
    found = full_weights({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]})
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    found["one.weight"].zero_()
    assert model.one.weight.any()


def test_an_optimizer_that_does_not_know_names_is_an_error_of_one_line(tmp_path):
    model = Net(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    trained(model, optimizer)
    path = checkpoint(tmp_path / "last.ckpt", model, optimizer)
    with pytest.raises(MixPrecError, match=r"keeps bits of 4 weights and does not say of which; .*named_parameters"):
        full_weights(path)
    optimizer.name_weights({param: name for name, param in model.named_parameters()})
    found = full_weights(checkpoint(path, model, optimizer))
    assert torch.equal(found["one.weight"], fp32_state_dict(model, optimizer)["one.weight"])


def test_names_are_of_no_concern_to_torch():
    model, other = Net(torch.float32), Net(torch.float32)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.name_weights({param: name for name, param in model.named_parameters()})
    trained(model, optimizer)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    theirs.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(
        theirs.state.values(), optimizer.state.values(), strict=True
    ))  # fmt: skip


@pytest.mark.parametrize("content", [None, [1], {"weights": 1}])
def test_what_is_no_checkpoint_is_an_error_of_one_line(tmp_path, content):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"none") if content is None else torch.save(content, path)
    with pytest.raises(MixPrecError, match="cannot be read as a checkpoint|has no state_dict") as error:
        full_weights(path)
    assert "\n" not in str(error.value)


def test_another_models_optimizer_is_an_error_of_one_line():
    model, other = Net(torch.bfloat16), Net(torch.bfloat16)
    with pytest.raises(MixPrecError, match="has 4 weights in 16 bits, and none of them is a weight of this Net"):
        fp32_state_dict(model, AdamW(other.parameters()))
