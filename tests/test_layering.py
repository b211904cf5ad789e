"""The layout's rules, read from the sources with `ast`, and shown to catch a planted violation of each kind."""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "lightning_mixprec"
ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_FILES_IN_A_ROOM = 16
MAX_PAGE_LINES = 60

# Each step sees those before it and itself; the rooms of one step do not see one another.
STEPS = [
    ["errors", "ranks", "records"],
    ["numerics"],
    ["policy"],
    ["optim", "planning", "engine"],
    ["plugin"],
    ["evidence"],
    ["callbacks", "deploy"],
    ["cli"],
]
MAY_IMPORT = {
    room: {room, *(earlier for before in STEPS[:place] for earlier in before)}
    for place, step in enumerate(STEPS)
    for room in step
}
MAY_IMPORT["errors"] = set()
MAY_IMPORT["ranks"] = {"ranks"}
MAY_IMPORT["records"] = {"errors", "ranks", "records"}
MAY_IMPORT["report"] = {"errors", "records", "numerics", "policy", "report"}
MAY_IMPORT["evidence/instruments"] = {
    "errors",
    "ranks",
    "records",
    "numerics",
    "policy",
    "engine",
    "evidence/instruments",
}
for room in ("evidence", "callbacks", "deploy", "cli"):
    MAY_IMPORT[room].add("evidence/instruments")
MAY_IMPORT["callbacks"].add("report")  # one of them writes it
MAY_IMPORT["cli"].add("report")
MAY_IMPORT["__init__"] = {room for step in STEPS[:-1] for room in step} | {"report"}

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
SUBROOMS = (
    "policy/written",
    "deploy/exporting",
    "engine/backends",
    "numerics/devices",
    "evidence/instruments",
    "evidence/instruments/restoring",
    "evidence/measuring",
)
KNOWS_LIGHTNING = {"plugin", "evidence", "callbacks", "deploy", "cli"}
TORCHMETRICS_FILE = "numerics/metrics.py"
# typing_extensions comes with torch; any package that is not here is optional.
REQUIRED = {"torch", "yaml", "torchmetrics", "typing_extensions", *LIGHTNING}


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name; deferred if it is only imported when a function runs, or for types.

    For circles and directions deferred imports count as any other; only optional packages have to be deferred.
    """

    module: str
    line: int
    deferred: bool

    @property
    def top(self):
        return self.module.partition(".")[0]


def layer_of(path):
    """The layer of a file, by its path inside the package; None where the layout has no place for it."""
    if path.startswith("evidence/instruments/"):
        return "evidence/instruments"
    first = path.partition("/")[0].removesuffix(".py")
    return first if first in MAY_IMPORT else None


def imports_of(path, source):
    return list(_imports(ast.parse(source), [PACKAGE, *path.split("/")[:-1]], deferred=False))


def _imports(node, package, deferred):
    for child in ast.iter_child_nodes(node):
        for module in _imported_by(child, package):
            yield Import(module, child.lineno, deferred)
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_for_types(child)
        yield from _imports(child, package, deferred or inner)


def _imported_by(node, package):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *filter(None, [node.module])])
        # `from package import name` may import a module of that name.
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "importlib.import_module",
        "import_module",
        "__import__",
    }:
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def _is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def module_file(module, files):
    """The file of the package that an absolute dotted name refers to, None if it is none of the package's."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    for length in range(len(parts), 0, -1):
        stem = "/".join(parts[1:length])
        for path in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if path in files:
                return path
    return None


def check_places(files):
    for path in files.sources:
        folder = path.rpartition("/")[0]
        if layer_of(path) is None:
            yield f"{path}: the layout has no place for it"
        elif "/" in folder and folder not in SUBROOMS:
            yield f"{path}: deeper than the house has rooms"


def check_rooms(files):
    """Every folder has a page that says what it is for, and no more files than a newcomer takes in at once."""
    rooms = {}
    for path in files.sources:
        folder, _, name = path.rpartition("/")
        if folder:
            rooms.setdefault(folder, []).append(name)
    for folder, names in rooms.items():
        if len(names) > MAX_FILES_IN_A_ROOM:
            yield f"{folder}: {len(names)} files, at most {MAX_FILES_IN_A_ROOM}"
        page = files.pages.get(folder)
        if page is None:
            yield f"{folder}: has no README.md that says what it is for"
            continue
        if len(page.splitlines()) > MAX_PAGE_LINES:
            yield f"{folder}: its README.md is longer than a page of {MAX_PAGE_LINES} lines"
        told = set(re.findall(r"`(\w+\.py)`", page)) - {"__init__.py"}
        for name in sorted(told ^ (set(names) - {"__init__.py"})):
            says = "names a file that is not there" if name in told else "does not name a file of the room"
            yield f"{folder}: its README.md {says}, {name}"


def check_directions(files):
    for path, source in files.sources.items():
        layer = layer_of(path)
        for imported in imports_of(path, source):
            target = module_file(imported.module, files.sources)
            if layer == "errors":
                yield f"{path}:{imported.line}: errors import nothing, here {imported.module}"
            elif (layer, target and layer_of(target), imported.deferred) == ("__init__", "cli", True):
                continue  # in __getattr__, when it is asked for
            elif target and layer and layer_of(target) not in MAY_IMPORT[layer]:
                yield f"{path}:{imported.line}: {layer} must not import {layer_of(target)}"


def check_cycles(files):
    edges = {
        path: {module_file(each.module, files.sources) for each in imports_of(path, source)} - {None, path}
        for path, source in files.sources.items()
    }
    done = set()

    def visit(path, trail):
        if path in trail:
            yield "import cycle: " + " -> ".join([*trail[trail.index(path) :], path])
        elif path not in done:
            for target in sorted(edges[path]):
                yield from visit(target, [*trail, path])
            done.add(path)

    for path in edges:
        yield from visit(path, [])


def check_frameworks(files):
    for path, source in files.sources.items():
        for imported in imports_of(path, source):
            if imported.top in LIGHTNING and layer_of(path) not in KNOWS_LIGHTNING:
                yield f"{path}:{imported.line}: {imported.top} has no place in {layer_of(path)}"
            if imported.top == "torchmetrics" and path != TORCHMETRICS_FILE:
                yield f"{path}:{imported.line}: torchmetrics belongs to {TORCHMETRICS_FILE} alone"


def check_optional_packages(files):
    homes = {}
    for path, source in files.sources.items():
        for imported in imports_of(path, source):
            if imported.top in REQUIRED | {PACKAGE, "__future__"} or imported.top in sys.stdlib_module_names:
                continue
            if not imported.deferred:
                yield f"{path}:{imported.line}: {imported.top} is optional, import it in the function that needs it"
            home = homes.setdefault(imported.top, path)
            if home != path:
                yield f"{path}:{imported.line}: {imported.top} belongs to {home} alone"


def check_sizes(files):
    for path, source in files.sources.items():
        lines = len(source.splitlines())
        if lines > MAX_FILE_LINES:
            yield f"{path}: {lines} lines, at most {MAX_FILE_LINES}"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = _length_without_docstring(node)
                if length > MAX_FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def _length_without_docstring(node):
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    spared = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - spared


CHECKS = [
    check_places,
    check_rooms,
    check_directions,
    check_cycles,
    check_frameworks,
    check_optional_packages,
    check_sizes,
]


@dataclass(frozen=True)
class Tree:
    """The Python files of a folder by their paths, and the README.md of each folder in it by its path."""

    sources: dict[str, str]
    pages: dict[str, str]


def read_tree(folder):
    def read(pattern):
        return {path.relative_to(folder): path.read_text("utf-8") for path in sorted(folder.rglob(pattern))}

    pages = {path.parent.as_posix(): text for path, text in read("README.md").items()}
    return Tree({path.as_posix(): source for path, source in read("*.py").items()}, pages)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_its_layout(check):
    files = read_tree(ROOT / PACKAGE)
    assert {"__init__.py", "errors.py"} <= set(files.sources)
    assert list(check(files)) == []


def test_the_examples_stay_small():
    assert list(check_sizes(read_tree(ROOT / "examples"))) == []


GOOD = {
    "__init__.py": "from lightning_mixprec.plugin.precision import A\nfrom lightning_mixprec.policy.rules import Rule",
    "errors.py": "class MixPrecError(ValueError): ...",
    "numerics/__init__.py": "",
    "numerics/formats.py": "import math\nimport torch\nfrom lightning_mixprec.errors import MixPrecError",
    "numerics/metrics.py": "import torchmetrics",
    "policy/rules.py": "import yaml\nfrom ..numerics import formats",
    "policy/table.py": "def show():\n    import rich.table",
    "records/journal.py": "from lightning_mixprec.ranks import count",
    "ranks.py": "import torch",
    "optim/options.py": "from lightning_mixprec.numerics.formats import A",
    "planning/controller.py": "from lightning_mixprec.records.journal import A",
    "evidence/instruments/sandbox.py": "from lightning_mixprec.engine.apply import attach",
    "evidence/replay.py": "from lightning_mixprec.evidence.instruments.sandbox import A\nimport lightning",
    "engine/apply.py": "from lightning_mixprec.policy.rules import Rule",
    "engine/backends/native.py": "from lightning_mixprec.errors import MixPrecError",
    "plugin/precision.py": "import lightning.pytorch as pl\nfrom lightning_mixprec.plugin.steps import A",
    "plugin/steps.py": "from lightning_mixprec.engine.apply import attach\nA = 1",
    "callbacks/overflow.py": "from lightning import Callback\nfrom lightning_mixprec.plugin.precision import A",
    "report.py": "from lightning_mixprec.policy.rules import Rule\ndef write():\n    import jinja2",
    "cli.py": "from lightning_mixprec.report import write\nfrom lightning_mixprec.callbacks import overflow",
}

LONG_FUNCTION = "def long():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
DOCUMENTED = 'def long():\n    """One.\n\n' + "    Two.\n" * 30 + '    """\n' + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)


def write_tree(folder, files):
    """Writes files, and for each folder a page that names them unless there is one."""
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)
    for room in {(folder / path).parent for path in files} - {folder}:
        if not (room / "README.md").exists():
            (room / "README.md").write_text("".join(f"- `{path.name}`\n" for path in room.glob("*.py")))
        elif not (room / "README.md").read_text():
            (room / "README.md").unlink()


def violations(folder, files):
    write_tree(folder, files)
    return [violation for check in CHECKS for violation in check(read_tree(folder))]


def test_a_good_tree_has_no_violations(tmp_path):
    assert violations(tmp_path, GOOD | {"engine/documented.py": DOCUMENTED}) == []


PLANTED = [
    ("errors.py", "import math", "errors.py:1: errors import nothing, here math"),
    ("numerics/a.py", "from lightning_mixprec.policy.rules import Rule", "numerics must not import policy"),
    ("numerics/a.py", "from ..policy.rules import Rule", "numerics must not import policy"),
    ("numerics/a.py", "from lightning_mixprec.policy import rules", "numerics must not import policy"),
    ("numerics/a.py", "def f():\n    import lightning_mixprec.engine.apply", "a.py:2: numerics must not import engine"),
    ("policy/a.py", "from lightning_mixprec.engine.apply import attach", "policy must not import engine"),
    ("policy/a.py", "from lightning_mixprec import Rule", "policy must not import __init__"),
    ("engine/a.py", "from lightning_mixprec.plugin.precision import A", "engine must not import plugin"),
    (
        "engine/a.py",
        "import importlib\nimportlib.import_module('lightning_mixprec.plugin.steps')",
        "must not import plugin",
    ),
    ("engine/backends/a.py", "from ...plugin.precision import A", "engine must not import plugin"),
    ("plugin/more.py", "from lightning_mixprec.callbacks.overflow import x", "plugin must not import callbacks"),
    ("callbacks/a.py", "from lightning_mixprec.cli import main", "callbacks must not import cli"),
    ("report.py", "from lightning_mixprec.engine.apply import attach", "report must not import engine"),
    ("report.py", "from lightning_mixprec.cli import main", "report must not import cli"),
    ("report/a.py", "from lightning_mixprec.callbacks.overflow import x", "report must not import callbacks"),
    ("plugin/more.py", "from lightning_mixprec.report import write", "plugin must not import report"),
    ("__init__.py", "from lightning_mixprec.cli import main", "__init__ must not import cli"),
    (
        "policy/rules.py",
        "from lightning_mixprec.policy.table import show",
        "import cycle: policy/rules.py -> policy/table",
    ),
    (
        "policy/rules.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_mixprec.policy.table import Table",
        "import cycle: policy/rules.py -> policy/table",
    ),
    (
        "policy/rules.py",
        "def show():\n    from lightning_mixprec.policy.table import show",
        "import cycle: policy/rules.py -> policy/table",
    ),
    ("policy/README.md", "", "policy: has no README.md"),
    ("policy/README.md", "- `rules.py`\n", "policy: its README.md does not name a file of the room, table.py"),
    (
        "policy/README.md",
        "- `rules.py`\n- `table.py`\n- `gone.py`\n",
        "policy: its README.md names a file that is not there, gone.py",
    ),
    ("policy/README.md", "`rules.py` `table.py`\n" + "More.\n" * 60, "policy: its README.md is longer than a page"),
    ("planning/a.py", "from lightning_mixprec.engine.apply import attach", "planning must not import engine"),
    ("planning/a.py", "from lightning_mixprec.optim.options import A", "planning must not import optim"),
    ("engine/a.py", "from lightning_mixprec.optim.options import A", "engine must not import optim"),
    ("records/a.py", "from lightning_mixprec.numerics.formats import A", "records must not import numerics"),
    ("plugin/more.py", "from lightning_mixprec.evidence.replay import A", "plugin must not import evidence"),
    (
        "evidence/instruments/a.py",
        "from lightning_mixprec.plugin.steps import A",
        "evidence/instruments must not import plugin",
    ),
    ("evidence/instruments/a.py", "import lightning", "lightning has no place in evidence/instruments"),
    ("report/a.py", "from lightning_mixprec.evidence.replay import A", "report must not import evidence"),
    ("numerics/a.py", "import lightning", "lightning has no place in"),
    (
        "policy/a.py",
        "from lightning.pytorch import Trainer",
        "lightning has no place in",
    ),
    ("engine/a.py", "def f():\n    import pytorch_lightning", "pytorch_lightning has no place in engine"),
    ("report.py", "import lightning.pytorch", "lightning has no place in report"),
    ("numerics/a.py", "import torchmetrics", "torchmetrics belongs to numerics/metrics.py alone"),
    ("callbacks/a.py", "from torchmetrics import Metric", "torchmetrics belongs to numerics/metrics.py alone"),
    ("callbacks/a.py", "import matplotlib.pyplot", "matplotlib is optional, import it in the function that needs it"),
    ("cli.py", "import jsonargparse", "jsonargparse is optional"),
    ("engine/a.py", "try:\n    import torchao\nexcept ImportError:\n    pass", "a.py:2: torchao is optional"),
    ("report.py", "def f():\n    import rich", "report.py:2: rich belongs to policy/table.py alone"),
    ("utils.py", "", "utils.py: the layout has no place for it"),
    ("helpers/a.py", "", "helpers/a.py: the layout has no place for it"),
    ("policy/forms/a.py", "", "policy/forms/a.py: deeper than the house has rooms"),
    ("engine/backends/fp8/a.py", "", "engine/backends/fp8/a.py: deeper than the house has rooms"),
    ("engine/a.py", "x = 1\n" * 401, "engine/a.py: 401 lines, at most 400"),
    ("engine/a.py", LONG_FUNCTION, "engine/a.py:1: long has 41 lines, at most 40"),
    ("engine/a.py", DOCUMENTED + "    x = 1\n", "engine/a.py:1: long has 41 lines, at most 40"),
    ("engine/a.py", "class A:\n" + LONG_FUNCTION.replace("\n", "\n    ").replace("def", "    def", 1), "41 lines"),
]


@pytest.mark.parametrize(("path", "source", "message"), PLANTED)
def test_a_planted_violation_is_caught(tmp_path, path, source, message):
    table = {"policy/table.py": "import lightning_mixprec.policy.rules"} if "cycle" in message else {}
    found = violations(tmp_path, GOOD | table | {path: source})
    assert any(message in each for each in found), found
    assert all(path.removesuffix("/README.md") in each for each in found), found


def test_a_room_with_too_many_files_is_caught(tmp_path):
    many = {f"policy/{'a' * length}.py": "" for length in range(1, MAX_FILES_IN_A_ROOM)}
    assert violations(tmp_path, GOOD | many) == [f"policy: {len(many) + 2} files, at most {MAX_FILES_IN_A_ROOM}"]
