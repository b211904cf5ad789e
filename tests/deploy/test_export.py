"""``export``: what stands in a file is what the policy said, and the module is as it was."""

import subprocess
import sys
import warnings
from dataclasses import dataclass

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_mixprec import MixPrecError, export
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.policy.policy import as_policy

MIXED = {"default": "bf16", "1": "c=fp32,o=input", "4": "fp16"}
FORMATS = ("pt2", "onnx", "torchscript", "weights")
SUFFIX = {"pt2": ".pt2", "onnx": ".onnx", "torchscript": ".ts", "weights": ".pt", "aoti": ".pt2"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))


def exported(tmp_path, module, policy, inputs, format="pt2", **options):
    with warnings.catch_warnings():
        if format == "torchscript":
            warnings.simplefilter("ignore", FutureWarning)
        path = tmp_path / f"model{SUFFIX[format]}"
        return export(module, path, policy=policy, example_inputs=inputs, format=format, **options)


def eager(module, policy, *inputs):
    """What the module computes under a policy by torch's own kernels: the oracle."""
    was_training = module.training
    module.eval()
    attachment = attach(module, as_policy(policy).resolve(module), "cpu", emulate=False)
    try:
        with torch.no_grad(), attachment.context():
            return module(*inputs)
    finally:
        attachment.detach()
        module.train(was_training)


def loaded_torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path))


class TestPt2:
    def test_is_bitwise_the_module_under_its_policy_on_other_inputs_too(self, tmp_path):
        model, x = network(), torch.randn(3, 8)
        made = exported(tmp_path, model, MIXED, x)
        assert made.max_difference == 0
        program = torch.export.load(made.path).module()
        other = torch.randn(3, 8)
        assert torch.equal(program(other), eager(model, MIXED, other))

    def test_layers_are_read_from_the_graph(self, tmp_path):
        made = exported(tmp_path, network(), MIXED, torch.randn(3, 8))
        assert made.layers == {"0": "bf16", "1": "fp32", "2": "bf16", "3": "bf16", "4": "fp16"}

    def test_every_cast_is_an_operation(self, tmp_path):
        made = exported(tmp_path, network(), MIXED, torch.randn(3, 8))
        graph = torch.export.load(made.path).graph
        assert not any("autocast" in str(node.target) for node in graph.nodes)
        casts = [node.kwargs["dtype"] for node in graph.nodes if "_to_copy" in str(node.target)]
        assert {torch.bfloat16, torch.float32, torch.float16} <= set(casts)

    def test_is_loaded_where_this_package_is_not(self, tmp_path):
        model, x = network(), torch.randn(3, 8)
        policy = {"default": "bf16", "0": "fp8", "4": "fp16"}
        made = exported(tmp_path, model, policy, x)
        torch.save((x, eager(model, policy, x)), tmp_path / "expected.pt")
        code = f"""
import sys
sys.modules["lightning_mixprec"] = None
import torch
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(torch.export.load({str(made.path)!r}).module()(x), expected)
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)

    def test_dynamic_shapes_vary(self, tmp_path):
        model = network()
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = {"input": {0: batch}}
        made = exported(tmp_path, model, MIXED, torch.randn(3, 8), dynamic_shapes=shapes)
        other = torch.randn(7, 8)
        assert torch.equal(torch.export.load(made.path).module()(other), eager(model, MIXED, other))


class TestOnnx:
    @pytest.mark.parametrize("policy", ["fp32", "fp16", {"default": "fp16", "1": "c=fp32,o=input", "4": "fp32"}])
    def test_runs_in_onnxruntime(self, tmp_path, policy):
        model, x = network(), torch.randn(3, 8)
        made = exported(tmp_path, model, policy, x, "onnx")
        session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
        other = torch.randn(3, 8)
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        expected = eager(model, policy, other)
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-3 * expected.abs().max()

    def test_layers_are_read_from_the_graph(self, tmp_path):
        made = exported(tmp_path, network(), MIXED, torch.randn(3, 8), "onnx")
        assert made.layers == {"0": "bf16", "1": "fp32", "2": "bf16", "3": "bf16", "4": "fp16"}

    def test_weights_are_stored_in_their_formats(self, tmp_path):
        import onnx

        made = exported(tmp_path, network(), {"default": "fp16", "4": "fp32"}, torch.randn(3, 8), "onnx")
        kinds = {tuple(each.dims): each.data_type for each in onnx.load(made.path).graph.initializer}
        assert kinds[16, 8] == onnx.TensorProto.FLOAT16 == kinds[16, 16]
        assert onnx.TensorProto.FLOAT in {kinds.get((4, 16)), kinds.get((16, 4))}

    def test_opset_and_external_data(self, tmp_path):
        import onnx

        made = exported(tmp_path, network(), "fp16", torch.randn(3, 8), "onnx", opset=18, external_data=True)
        assert next(each.version for each in onnx.load(made.path).opset_import if not each.domain) == 18
        assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
        onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])

    def test_dynamic_shapes_vary(self, tmp_path):
        model = network()
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
        made = exported(tmp_path, model, "fp16", (torch.randn(3, 8),), "onnx", dynamic_shapes=shapes)
        session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
        other = torch.randn(7, 8)
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        expected = eager(model, "fp16", other)
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-3 * expected.abs().max()


class TestTorchScript:
    def test_is_bitwise_and_says_once_that_it_is_deprecated(self, tmp_path):
        model, x = network(), torch.randn(3, 8)
        with pytest.warns(FutureWarning, match="torch has deprecated TorchScript") as told:
            made = export(model, tmp_path / "m.ts", policy=MIXED, example_inputs=x, format="torchscript")
        assert len(told) == 1
        other = torch.randn(3, 8)
        assert torch.equal(loaded_torchscript(made.path)(other), eager(model, MIXED, other))
        assert made.layers == {"0": "bf16", "1": "fp32", "2": "bf16", "3": "bf16", "4": "fp16"}

    def test_a_layer_whose_kernel_has_its_casts_inside_is_named_itself(self, tmp_path):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.head = nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 1)

            def forward(self, x):
                return self.head(self.rnn(x)[0])

        with pytest.raises(MixPrecError, match="layer 'rnn' ") as error:
            exported(tmp_path, Recurrent(), "bf16", torch.randn(2, 3, 8), "torchscript")
        assert "fp32 in the policy" in str(error.value) and list(tmp_path.iterdir()) == []


class Unrunnable(torch.autograd.Function):
    """Refuses 16 bits, as kernels do that a CPU has not."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise RuntimeError("could not create a primitive descriptor")
        return x.clone()


class TestWeights:
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_each_weight_is_in_its_layers_format_and_loads(self, tmp_path, suffix):
        model = network()
        path = tmp_path / f"weights{suffix}"
        made = export(model, path, policy=MIXED, example_inputs=torch.randn(3, 8), format="weights")
        if suffix == ".pt":
            state = torch.load(path, weights_only=True)
        else:
            from safetensors.torch import load_file

            state = load_file(path)
        expected = {"0": torch.bfloat16, "1": torch.float32, "3": torch.bfloat16, "4": torch.float16}
        assert {name.partition(".")[0]: value.dtype for name, value in state.items()} == expected
        assert made.layers == {"0": "bf16", "1": "fp32", "3": "bf16", "4": "fp16"}
        other, x = network(), torch.randn(3, 8)
        nn.init.zeros_(other[0].weight)
        other.load_state_dict(state)
        assert torch.equal(eager(other, MIXED, x), eager(model, MIXED, x))

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_are_written_where_they_cannot_be_run(self, tmp_path, suffix):
        class Elsewhere(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return Unrunnable.apply(self.layer(x))

        model, x, path = Elsewhere(), torch.randn(2, 4), tmp_path / f"weights{suffix}"
        made = export(model, path, policy="fp16", example_inputs=x, format="weights")
        assert made.layers == {"layer": "fp16"} and made.max_difference != made.max_difference
        assert (
            made.not_run
            == "it was not run, as this device cannot (RuntimeError: could not create a primitive descriptor)"
        )
        assert made.not_run in str(made)
        if suffix == ".pt":
            assert torch.equal(torch.load(path, weights_only=True)["layer.weight"], model.layer.weight.half())
        with pytest.raises(MixPrecError, match="cannot be run on example_inputs"):
            export(model, tmp_path / "m.pt2", policy="fp16", example_inputs=x)
        with pytest.raises(MixPrecError, match="cannot be run on example_inputs"):
            export(model, path, policy="fp16", example_inputs=torch.randn(2, 3), format="weights")

    def test_is_half_the_size(self, tmp_path):
        model = nn.Linear(256, 256)
        for policy in ("fp32", "bf16"):
            path = tmp_path / f"{policy}.pt"
            export(model, path, policy=policy, example_inputs=torch.randn(1, 256), format="weights")
        sizes = [(tmp_path / f"{policy}.pt").stat().st_size for policy in ("fp32", "bf16")]
        assert sizes[1] < 0.52 * sizes[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.second = self.first

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


class TestTiedWeights:
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_layer_with_two_names_keeps_its_own(self, tmp_path, format):
        model = Twice()
        before = {name: (each, each.clone()) for name, each in model.named_parameters()}
        exported(tmp_path, model, "bf16", torch.randn(2, 6), format)
        for name, each in model.named_parameters():
            assert each is before[name][0] and torch.equal(each, before[name][1]) and each.requires_grad, name

    def test_are_one_in_a_file_of_torch(self, tmp_path):
        model = Tied()
        tokens = torch.randint(32, (2, 5))
        made = exported(tmp_path, model, "bf16", tokens, "weights")
        state = torch.load(made.path, weights_only=True)
        assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
        other = Tied()
        other.load_state_dict(state)
        assert other.head.weight is other.embedding.weight
        assert torch.equal(other.head.weight, model.head.weight.bfloat16().float())

    def test_are_one_in_a_program(self, tmp_path):
        made = exported(tmp_path, Tied(), {"default": "bf16"}, torch.randint(32, (2, 5)))
        assert made.layers["head"] == "bf16"
        assert made.max_difference == 0
        program = torch.export.load(made.path)
        assert len({tensor.data_ptr() for tensor in program.state_dict.values()}) == 1


INT8 = native_support("int8", "cpu")
needs_int8 = pytest.mark.skipif(not INT8.native, reason=f"no products of int8 here: {INT8.reason}")


class TestEightBits:
    @pytest.mark.parametrize("narrow", [pytest.param("int8", marks=needs_int8), "fp8"])
    @pytest.mark.parametrize("format", ["pt2", "torchscript"])
    def test_are_operations_of_torch(self, tmp_path, narrow, format):
        made = exported(tmp_path, network(), {"default": "bf16", "3": narrow}, torch.randn(3, 8), format)
        assert made.layers["3"] == narrow
        assert made.layers["0"] == "bf16"
        assert made.max_difference == 0

    @needs_int8
    def test_int8_is_an_operation_of_onnx(self, tmp_path):
        import onnx

        made = exported(tmp_path, network(), {"default": "fp16", "3": "int8"}, torch.randn(3, 8), "onnx")
        assert made.layers["3"] == "int8"
        assert "MatMulInteger" in {node.op_type for node in onnx.load(made.path).graph.node}

    @pytest.mark.parametrize(
        ("format", "narrow"),
        [("onnx", "fp8"), ("weights", "fp8"), pytest.param("weights", "int8", marks=needs_int8)],
    )
    def test_are_refused_by_name_elsewhere(self, tmp_path, format, narrow):
        with pytest.raises(MixPrecError, match=f"layer '3' computes in {narrow}"):
            exported(tmp_path, network(), {"default": "bf16", "3": narrow}, torch.randn(3, 8), format)
        assert list(tmp_path.iterdir()) == []


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.make = make

    def forward(self, x, *, scale=None):
        result = self.layer(x)
        return self.make(result if scale is None else result * scale)


class TestInputsAndResults:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("make", [Output, lambda x: {"a": x, "b": x + 1}, lambda x: (x, [x + 1])])
    def test_any_plain_result_and_arguments_by_name(self, tmp_path, format, make):
        inputs = {"x": torch.randn(3, 4), "scale": torch.tensor(2.0)}
        made = exported(tmp_path, Returning(make), "bf16", inputs, format)
        assert made.layers["layer"] == "bf16"

    def test_a_dataclass_leaves_as_a_dict(self, tmp_path):
        made = exported(tmp_path, Returning(Output), "bf16", torch.randn(3, 4))
        assert list(torch.export.load(made.path).module()(torch.randn(3, 4))) == ["logits"]


class TestNothingOfTheModuleChanges:
    @pytest.mark.parametrize("format", ["pt2", "weights"])
    def test_what_hooks_and_modules_collect_is_put_back(self, tmp_path, format):
        seen, counts, model = ["first"], {"calls": 0}, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model.shapes = [(1, 4)]

        def collect(module, inputs, output):
            seen.append(output.shape)
            counts["calls"] += 1
            model.shapes.append(tuple(output.shape))

        model[0].register_forward_hook(collect)
        exported(tmp_path, model, "bf16", torch.randn(2, 4), format)
        assert (seen, counts, model.shapes) == (["first"], {"calls": 0}, [(1, 4)])

    @pytest.mark.parametrize("format", FORMATS)
    def test_as_it_was(self, tmp_path, format):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
        model[2].eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [each.training for each in model.modules()]
        attributes = [sorted(vars(each)) for each in model.modules()]
        images = torch.randn(2, 3, 8, 8)
        random = torch.get_rng_state()
        exported(tmp_path, model, {"default": "bf16", "4": "p=bf16,c=fp32"}, images, format)
        assert torch.equal(torch.get_rng_state(), random)
        assert [each.training for each in model.modules()] == modes
        assert [sorted(vars(each)) for each in model.modules()] == attributes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model[4].weight.dtype == torch.float32
