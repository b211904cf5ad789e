"""``onnx``: a graph of ONNX, strongly typed: a Cast stands wherever the format changes."""

import ast
import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.deploy.exporting.closeness import tensors_of
from lightning_mixprec.deploy.exporting.layer_formats import Use
from lightning_mixprec.deploy.exporting.programs import formats_of, layer_named
from lightning_mixprec.deploy.exporting.protocol import Job, Opened, missing
from lightning_mixprec.errors import ExportError, one_line

_PRODUCTS = frozenset(
    (
        "Attention",
        "Conv",
        "ConvTranspose",
        "DeformConv",
        "Einsum",
        "GRU",
        "Gemm",
        "LSTM",
        "MatMul",
        "MatMulInteger",
        "RNN",
    )
)
_MOVE_NAMES = """
Cast CastLike Reshape Transpose Squeeze Unsqueeze Concat Split Slice Gather GatherND GatherElements Expand Identity
Shape Size Constant ConstantOfShape Flatten Pad Tile Where Range ScatterND ScatterElements Dropout Compress
"""
_MOVES = frozenset(_MOVE_NAMES.split())
_NORMS = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization")
"""Norms whose input and weights are of one type."""

_LARGE = 2**31
"""The size in bytes from which a message of ONNX holds no weights, and no constant is made."""


class Onnx:
    """Files of ONNX, by torch's exporter of graphs."""

    name = "onnx"

    def check(self, path: Path, job: Job) -> None:
        """Asks for the packages, and for layers whose products ONNX has.

        Raises:
            ExportError: A package is missing, or a layer computes in fp8.
        """
        for package in ("onnx", "onnxscript"):
            _imported(package)
        for name, layer in job.layers.items():
            if layer.has_narrow_products and layer.compute != "int8":
                raise ExportError(
                    f"layer {name!r} computes in {layer.compute}, and ONNX has no product of such numbers; give it "
                    f"int8 or {layer.region} in the policy of the export, or export to 'pt2'"
                )

    def write(self, path: Path, job: Job) -> None:
        """Writes the graph; weights are in the file, or beside it."""
        weights = sum(each.numel() * each.element_size() for each in job.model.parameters())
        try:
            with _quiet():
                made = torch.onnx.export(
                    job.program.exported,
                    dynamo=True,
                    opset_version=job.options.opset,
                    custom_translation_table=_int8_products(),
                    optimize=False,
                    verbose=False,
                )
                assert made is not None
                _fold_casts_of_weights(made.model)
                made.save(path, external_data=job.options.external_data or weights >= _LARGE)
                _type_norms(path)
        except Exception as error:  # of a converter
            raise ExportError(
                f"torch.onnx cannot write this module: {_reason(error)[:300]}; export it to 'pt2'"
            ) from error
        try:
            _imported("onnx").checker.check_model(str(path))
        except Exception as error:
            raise ExportError(f"onnx.checker refuses the file, which was not kept: {one_line(error)[:300]}") from error

    def opened(self, path: Path, job: Job) -> Opened:
        """Reads the graph, and runs it with onnxruntime where that is installed and computes it, else with ONNX's own.

        Reads formats from the types that stand in the graph.
        """
        onnx = _imported("onnx")
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
        written = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        if job.options.opset not in (None, written):
            raise ExportError(f"torch wrote opset {written} where {job.options.opset} was asked for; ask for {written}")
        names = [each.name for each in model.graph.input]
        inputs = dict(zip(names, job.example.tensors, strict=True))
        return Opened(_runner(path, onnx, inputs), list(_uses(onnx, model.graph, {})), False)


def _imported(package: str) -> Any:
    try:
        if package == "onnx":
            import onnx
            import onnx.checker
            import onnx.reference
            import onnx.shape_inference

            return onnx
        import onnxscript

        return onnxscript
    except ImportError as error:
        raise missing(package, "export to 'pt2', which needs nothing more") from error


def _reason(error: Exception) -> str:
    """The last of the reasons that torch's exporter lists, which is the first that it met."""
    return next((line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)


def _fold_casts_of_weights(model: Any) -> None:
    """Has weights stored in the format that they are used in.

    torch's own optimizer does more: it folds batch norms into convolutions, where formats differ into one that takes
    16-bit inputs and weights in fp32, which no runtime has.
    """
    from onnxscript import optimizer

    optimizer.fold_constants(model, input_size_limit=_LARGE, output_size_limit=_LARGE)
    optimizer.remove_unused_nodes(model)


def _type_norms(path: Path) -> None:
    """Has norms of 16-bit inputs with weights in fp32 computed in fp32, as torch computes them.

    ONNX has norms of one type, and torch's exporter does not say the casts.
    """
    onnx = _imported("onnx")
    model = onnx.load(str(path), load_external_data=False)
    types = _types(onnx.shape_inference.infer_shapes(model).graph)
    nodes = []
    for node in model.graph.node:
        kinds = [types.get(name, 0) for name in node.input[:2]]
        if node.op_type not in _NORMS or kinds[0] == kinds[1] or 0 in kinds:
            nodes.append(node)
            continue
        taken, given = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{given}_wide_input", f"{given}_wide"
        before = onnx.helper.make_node("Cast", [taken], [node.input[0]], to=kinds[1])
        after = onnx.helper.make_node("Cast", [node.output[0]], [given], to=kinds[0])
        for cast in (before, after):
            cast.metadata_props.extend(node.metadata_props)
        nodes += [before, node, after]
    if len(nodes) != len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, str(path))


def _int8_products() -> dict[Any, Callable[..., Any]]:
    """The product of integers, which torch's exporter does not know, as ONNX has it."""
    op = _imported("onnxscript").opset18

    def int_mm(self: Any, mat2: Any) -> Any:
        return op.MatMulInteger(self, mat2)

    return {torch.ops.aten._int_mm.default: int_mm}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress that torch's exporter prints, and what its optimizer notes."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _runner(path: Path, onnx: Any, inputs: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    arrays = {name: _array(onnx, tensor) for name, tensor in inputs.items()}

    def run() -> list[Tensor]:
        outputs = None
        with contextlib.suppress(ImportError):
            outputs = _by_onnxruntime(path, arrays)
        if outputs is None:
            outputs = onnx.reference.ReferenceEvaluator(str(path)).run(None, arrays)
        return tensors_of([_tensor(each) for each in outputs])

    return run


def _by_onnxruntime(path: Path, arrays: dict[str, Any]) -> Any:
    """The outputs by onnxruntime on the CPU; None for a graph that it has no arithmetic for, as that of bf16."""
    import onnxruntime

    refused = (
        onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
        onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    )
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return session.run(None, arrays)
    except (*refused, RuntimeError):
        return None


def _array(onnx: Any, tensor: Tensor) -> Any:
    value = tensor.detach().cpu()
    if value.dtype == torch.bfloat16:
        kind = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
        return value.view(torch.int16).numpy().view(kind)
    return value.numpy()


def _tensor(array: Any) -> Tensor:
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.as_tensor(array)


def _uses(onnx: Any, graph: Any, outer: dict[str, int]) -> Iterator[Use]:
    types = outer | _types(graph)
    for node in graph.node:
        scopes = next((each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes"), None)
        if scopes is not None and node.op_type not in _MOVES:
            is_product = node.op_type in _PRODUCTS
            taken = [types.get(name, 0) for name in node.input[: 2 if is_product else None] if name]
            path = ast.literal_eval(scopes)[-2]
            yield Use(
                layer_named(path), node.op_type, is_product, formats_of([*filter(None, map(_dtype(onnx), taken))])
            )
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _uses(onnx, attribute.g, types)


def _types(graph: Any) -> dict[str, int]:
    """The element types of a graph's values, as far as they are known."""
    values = (*graph.input, *graph.value_info, *graph.output)
    return {each.name: each.data_type for each in graph.initializer} | {
        value.name: value.type.tensor_type.elem_type for value in values
    }


def _dtype(onnx: Any) -> Callable[[int], torch.dtype | None]:
    kinds = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
        onnx.TensorProto.DOUBLE: torch.float64,
        onnx.TensorProto.INT8: torch.int8,
        onnx.TensorProto.INT64: torch.int64,
    }
    return kinds.get
