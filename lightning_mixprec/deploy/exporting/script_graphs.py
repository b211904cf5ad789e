"""The formats of layers in a file of TorchScript, whose graphs say no dtypes: seen by running them, node by node."""

from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.deploy.exporting.example import Example
from lightning_mixprec.deploy.exporting.layer_formats import Use
from lightning_mixprec.deploy.exporting.programs import MOVES, PRODUCTS, formats_of, layer_named
from lightning_mixprec.errors import ExportError, one_line


class ScriptReader:
    """Runs the graphs of a loaded module and notes what the operations of each layer take.

    Args:
        model: The module.

    Attributes:
        seen: The operations so far; the last one is what does not run, if one does not.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seen: list[Use] = []

    def uses(self, example: Example) -> list[Use]:
        """The operations that an example runs.

        Raises:
            ExportError: A graph has a node that is not known here.
        """
        arguments = [*example.args, *example.kwargs.values()]
        with torch.no_grad():
            self._call(self._model, "forward", "", arguments)
        return self.seen

    def _call(self, module: Any, method: str, path: str, arguments: list[Any]) -> Any:
        graph = module._c._get_method(method).graph
        values: dict[str, Any] = {}
        paths: dict[str, str] = {}
        inputs = list(graph.inputs())
        paths[inputs[0].debugName()] = path
        for value, argument in zip(inputs, [module, *arguments], strict=True):
            values[value.debugName()] = argument
        for node in graph.nodes():
            self._run(node, values, paths, path)
        results = [values[each.debugName()] for each in graph.outputs()]
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, node: Any, values: dict[str, Any], paths: dict[str, str], path: str) -> None:
        kind, names = node.kind(), [each.debugName() for each in node.outputs()]
        taken = [values[each.debugName()] for each in node.inputs()]
        if kind == "prim::Constant":
            result = next(iter(node.outputs())).toIValue()
        elif kind == "prim::GetAttr":
            result = getattr(taken[0], node.s("name"))
            above = paths[next(iter(node.inputs())).debugName()]
            paths[names[0]] = f"{above}.{node.s('name')}".removeprefix(".")
        elif kind == "prim::CallMethod":
            inner = paths[next(iter(node.inputs())).debugName()]
            result = self._call(taken[0], node.s("name"), inner, taken[1:])
        elif kind in _BUILDERS:
            result = _BUILDERS[kind](taken)
        elif kind.startswith(("aten::", "prim::", "torchvision::")):
            result = self._operation(node, taken, path)
        else:
            raise ExportError(f"the torchscript file has a {kind} that cannot be read back; export to 'pt2'")
        results = result if len(names) > 1 else (result,)
        values.update(zip(names, results, strict=True))

    def _operation(self, node: Any, taken: list[Any], path: str) -> Any:
        kind = node.kind()
        called = kind.rpartition("::")[2]
        dtypes = [each.dtype for each in _tensors(taken)]
        if called not in MOVES and dtypes:
            is_product = called in PRODUCTS
            chosen = dtypes[:2] if "scaled_mm" in called or called == "_int_mm" else dtypes
            self.seen.append(Use(layer_named(path), called, is_product, formats_of(chosen)))
        operation = torch._C._jit_get_operation(kind)[0]
        named = [each.name if each.kwarg_only else None for each in torch._C.parse_schema(node.schema()).arguments]
        by_position = [value for name, value in zip(named, taken, strict=True) if name is None]
        try:
            return operation(*by_position, **{name: value for name, value in zip(named, taken, strict=True) if name})
        except RuntimeError as error:
            raise ExportError(
                f"layer {layer_named(path)!r} has an operation {called} that does not run as it was traced "
                f"({one_line(error)[:200]}); give the layer fp32 in the policy of the export, or export to 'pt2'"
            ) from error


def _tensors(values: list[Any]) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


_BUILDERS: dict[str, Any] = {
    "prim::ListConstruct": list,
    "prim::TupleConstruct": tuple,
    "prim::DictConstruct": lambda taken: dict(zip(taken[::2], taken[1::2], strict=True)),
    "prim::ListUnpack": lambda taken: tuple(taken[0]) if len(taken[0]) > 1 else taken[0][0],
    "prim::TupleUnpack": lambda taken: tuple(taken[0]) if len(taken[0]) > 1 else taken[0][0],
    "prim::NumToTensor": lambda taken: torch.as_tensor(taken[0]),
}
"""The nodes that build values or take them apart."""
