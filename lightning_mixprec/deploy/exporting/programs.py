"""A module as a graph of ``torch.export`` in which every cast is an operation, and the formats in such a graph.

torch traces a change of autocast as a graph within the graph. Taking these apart makes autocast's casts explicit; here
each inner graph is run node by node, so that every operation keeps the name of its layer.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lightning_mixprec.deploy.exporting.example import Example
from lightning_mixprec.deploy.exporting.formatted import Formatted
from lightning_mixprec.deploy.exporting.layer_formats import Use
from lightning_mixprec.engine.backends.scaled_products import decomposed_product, product_operation
from lightning_mixprec.errors import ExportError, MixPrecError, one_line
from lightning_mixprec.numerics.formats import FORMATS, format_of

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
_MADE_OF_PRODUCTS = (*_RECURRENT, "einsum", "tensordot", "inner", "linalg_multi_dot", "linalg_matrix_power")
"""Operations inside which autocast casts: they are taken apart where it is on."""

_FUSED = ("lstm",)
"""Of these, the ones that torch computes by a kernel of its own, which rounds elsewhere than its parts do."""

_PRODUCTS = """
mm addmm bmm baddbmm addbmm matmul linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d
conv_transpose3d _convolution convolution_overrideable _int_mm _scaled_mm _scaled_mm_v2 scaled_dot_product_attention
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_attention_math
_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention mkldnn_rnn_layer _cudnn_rnn
_transformer_encoder_layer_fwd _native_multi_head_attention
"""
PRODUCTS = frozenset((*_PRODUCTS.split(), *_MADE_OF_PRODUCTS))
"""The names of torch's operations that are products, or made of them; autocast computes all of them in its format."""

_MOVES = """
_to_copy to clone copy copy_ view reshape _unsafe_view permute transpose t numpy_T select slice squeeze unsqueeze expand
expand_as cat stack split split_with_sizes unsafe_split chunk unbind getitem flatten unflatten contiguous detach alias
lift_fresh_copy index gather index_select pad constant_pad_nd _assert_tensor_metadata zeros ones full empty zeros_like
ones_like full_like empty_like new_zeros new_ones new_full new_empty arange dropout dropout_ feature_dropout
alpha_dropout flip roll repeat masked_fill masked_fill_ where type_as movedim narrow unfold as_strided view_as
pixel_shuffle embedding_renorm_ sym_size size _assert_async resolve_conj resolve_neg
"""
MOVES = frozenset(_MOVES.split())
"""The names of operations that move numbers and compute nothing: they have no format of their own."""


class Program(NamedTuple):
    """A traced module.

    Attributes:
        exported: The graph.
        is_exact: Whether each operation is the one that torch computes in the module.
    """

    exported: ExportedProgram
    is_exact: bool


def program_of(model: Formatted, example: Example, dynamic_shapes: Any = None) -> Program:
    """Traces a module into a graph in which every cast is an operation.

    Args:
        model: The module, formats in force.
        example: What it is given.
        dynamic_shapes: As ``torch.export`` takes them, by argument of the module's forward.

    Raises:
        ExportError: torch cannot trace it.
    """
    try:
        traced = torch.export.export(
            model,
            example.args,
            example.kwargs,
            dynamic_shapes=_shapes_by_argument(model.module, example, dynamic_shapes),
            strict=False,
        )
        states = _States(traced)
        return Program(traced.run_decompositions(states.decompositions()), states.keeps_fused)
    except MixPrecError:
        raise
    except Exception as error:  # whatever the module's code meets under a tracer
        raise ExportError(
            f"torch.export cannot trace {type(model.module).__name__}.forward: {one_line(error)[:300]}; export a part "
            "of it, or make what forward does depend on its inputs' shapes alone"
        ) from error


def _shapes_by_argument(module: nn.Module, example: Example, shapes: Any) -> Any:
    """Dynamic shapes as the wrapper around a module takes them: arguments by position, and others by name."""
    if shapes is None:
        return None
    names = list(inspect.signature(module.forward).parameters)
    if isinstance(shapes, Mapping):
        unknown = sorted(set(shapes) - set(names) - set(example.kwargs))
        if unknown:
            raise ExportError(
                f"dynamic_shapes names {unknown[0]!r}, which is no argument of forward({', '.join(names)})"
            )
        by_position = tuple(shapes.get(name) for name in names[: len(example.args)])
    else:
        by_position = tuple(shapes)
    found: dict[str, Any] = {}
    if example.args:
        found["args"] = by_position
    if example.kwargs:
        by_name = shapes if isinstance(shapes, Mapping) else {}
        found["kwargs"] = {name: by_name.get(name) for name in example.kwargs}
    return found


class _States:
    """Autocast's state while a graph is taken apart, which torch hides from what takes an operation apart.

    Args:
        traced: The graph.
    """

    def __init__(self, traced: ExportedProgram) -> None:
        self._now: list[tuple[str, torch.dtype] | None] = [None]
        self._taken_apart = {node.target for node in _nodes_under_autocast(traced.graph_module, False)}
        nodes = [node for graph in _graphs(traced) for node in graph.graph.nodes]
        fused = [node.target for node in nodes if _name_of(node.target) in _FUSED]
        self.keeps_fused = self._taken_apart.isdisjoint(fused)
        for graph in _graphs(traced):
            if graph is not traced.graph_module:
                vars(graph)["forward"] = self._by_node(graph)

    def decompositions(self) -> dict[Any, Any]:
        """What takes operations apart: those inside which autocast casts, where it is on, and products of 8 bits."""
        known = torch.export.default_decompositions()
        table = {each: self._under_autocast(known[each]) for each in self._taken_apart}
        return {**table, product_operation(): decomposed_product}

    def _by_node(self, graph: fx.GraphModule) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            devices = [device for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)]
            self._now.append((devices[0], torch.get_autocast_dtype(devices[0])) if devices else None)
            try:
                return fx.Interpreter(graph).run(*args)
            finally:
                self._now.pop()

        return run

    def _under_autocast(self, decomposition: Callable[..., Any]) -> Callable[..., Any]:
        def parts(*args: Any, **kwargs: Any) -> Any:
            state = self._now[-1]
            if state is None:
                return decomposition(*args, **kwargs)
            with torch.autocast(state[0], dtype=state[1], cache_enabled=False):
                return decomposition(*args, **kwargs)

        return parts


def _graphs(traced: ExportedProgram) -> list[fx.GraphModule]:
    return [graph for graph in traced.graph_module.modules() if isinstance(graph, fx.GraphModule)]


def _nodes_under_autocast(graph: fx.GraphModule, is_on: bool) -> Iterator[fx.Node]:
    """The calls of operations that are made of products, where autocast is on."""
    for node in graph.graph.nodes:
        if is_on and _name_of(node.target) in _MADE_OF_PRODUCTS:
            yield node
        inner = [each for each in node.args if isinstance(each, fx.Node) and each.op == "get_attr"]
        for each in inner if node.op == "call_function" else ():
            if isinstance(part := getattr(graph, str(each.target), None), fx.GraphModule):
                is_switch = _name_of(node.target) == "wrap_with_autocast"
                yield from _nodes_under_autocast(part, bool(node.args[2]) if is_switch else is_on)


def _name_of(operation: Any) -> str:
    schema = getattr(operation, "_schema", None)
    return str(getattr(operation, "__name__", operation)) if schema is None else schema.name.rpartition("::")[2]


def uses_in(exported: ExportedProgram) -> list[Use]:
    """The operations in a graph, each with the layer that it belongs to."""
    return list(_uses(exported))


def _uses(exported: ExportedProgram) -> Iterator[Use]:
    for graph in _graphs(exported):
        for node in graph.graph.nodes:
            if node.op != "call_function" or not (stack := node.meta.get("nn_module_stack")):
                continue
            operation = _name_of(node.target)
            if operation not in MOVES:
                is_product = operation in PRODUCTS
                taken = list(_dtypes(node.all_input_nodes))
                # Of a product the operands: what else it takes are scales, masks and states.
                chosen = taken[: 2 if "scaled_mm" in operation or operation == "_int_mm" else None]
                yield Use(_layer(stack), operation, is_product, formats_of(chosen))


def layers_of_products(exported: ExportedProgram) -> dict[str, str]:
    """By the name of each node that is a product, the layer that it belongs to."""
    return {
        node.name: _layer(stack)
        for graph in _graphs(exported)
        for node in graph.graph.nodes
        if _name_of(node.target) in PRODUCTS and (stack := node.meta.get("nn_module_stack"))
    }


def _dtypes(nodes: list[fx.Node]) -> Iterator[torch.dtype]:
    for node in nodes:
        with contextlib.suppress(AttributeError):
            yield node.meta["val"].dtype


def formats_of(dtypes: list[torch.dtype]) -> frozenset[str]:
    """The formats of floating dtypes; of 8-bit ones those that layers compute in. int8 counts where nothing floats."""
    names = {format_of(dtype) for dtype in dtypes} - {None}
    if not names and dtypes and all(dtype == torch.int8 for dtype in dtypes):
        names = {"int8"}
    wholes = {part.name: whole.name for whole in FORMATS.values() for part in whole.parts or ()}
    return frozenset(wholes.get(name, name) for name in names if name is not None)


def _layer(stack: Mapping[str, Any]) -> str:
    path = str(list(stack.values())[-1][0])
    return layer_named(path)


def layer_named(path: str) -> str:
    """A layer's own name, from that in a graph of the module in its wrapper.

    >>> layer_named("module.encoder.0"), layer_named("module"), layer_named("module.encoder.0@1")
    ('encoder.0', '', 'encoder.0')
    """
    path = re.sub(r"@\d+", "", path)
    return path.removeprefix("module").removeprefix(".")
