"""The written pages agree with the code: their Python, YAML, defaults, commands, paths and links."""

import ast
import builtins
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_mixprec
from lightning_mixprec import PerLayerPrecision, PrecisionPolicy

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GUIDES = sorted((EXAMPLES / "guides").glob("*.md"))
ROOMS = sorted((ROOT / "lightning_mixprec").glob("**/README.md"))
PAGES = [ROOT / "README.md", EXAMPLES / "README.md", *GUIDES]
PUBLIC = {name: getattr(lightning_mixprec, name) for name in lightning_mixprec.__all__}
GIVEN = {"model", "batch", "gradient"}  # names in Python on the pages that stand for something of the reader's


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages(chosen: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", chosen, ids=name_of)


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Return the page without its blocks of code, fenced or indented."""
    return re.sub(r"^```.*?^```$|^    [^\n]*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_there_is_code_to_check() -> None:
    counts = {language: sum(len(blocks(page, language)) for page in PAGES) for language in ("python", "yaml", "bash")}
    assert all(count >= 5 for count in counts.values()), counts


# The guides' order


def test_the_readme_is_short_and_leads_to_every_guide() -> None:
    readme, listed = (ROOT / "README.md").read_text(), (EXAMPLES / "guides" / "README.md").read_text()
    assert len(readme.splitlines()) <= 250
    for guide in set(GUIDES) - {EXAMPLES / "guides" / "README.md"}:
        assert f"]({name_of(guide)}" in readme
        assert f"| [{guide.name}]({guide.name}) |" in listed
        assert guide.read_text().split("\n\n")[1].startswith("This page answers: ")


def test_the_table_of_doors_has_every_public_name_and_leads_to_its_guide() -> None:
    (table,) = re.findall(r"\| door \| what it does \|\n\|---\|---\|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    rows = [row.split(" | ") for row in table.splitlines()]
    doors = [word for door, _ in rows for word in re.findall(r"`([^`]+)`", door)]
    assert sorted(doors) == sorted([*PUBLIC, "python -m lightning_mixprec.report RUN [RUN]"])
    assert [door for door, what in rows if "](examples/guides/" not in what] == ["| `MixPrecError`"]


def test_what_lies_flat_in_the_examples_runs_and_what_is_shared_does_not() -> None:
    runs = {path.name: 'if __name__ == "__main__":' in path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(runs.values()) == {True}, runs
    shared = {path.name: "__main__" in path.read_text() for path in (EXAMPLES / "shared").glob("*.py")}
    assert set(shared.values()) == {False}, shared


# Python


def bound(tree: ast.AST) -> set[str]:
    """Return the names that some code imports, defines or assigns."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pages([page for page in PAGES if blocks(page, "python")])
def test_python_on_a_page_imports_what_it_names(page: Path) -> None:
    known = {*vars(builtins), *GIVEN}
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert [importlib.import_module(alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        known |= bound(tree)  # a later block goes on from an earlier one
        assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - known == set(), code


def calls(page: Path) -> list[ast.Call]:
    """Return the calls of public names on a page, in its blocks of Python and in its prose."""
    found = []
    for code in [*blocks(page, "python"), *re.findall(r"`(\w+\([^`]*\))`", prose(page))]:
        code = re.sub(r", \.\.\.\)$|=\.\.\.\)$", lambda end: ")" if end[0][0] == "," else "=None)", code)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PUBLIC:
                found.append(node)
    return found


@pages(PAGES)
def test_calls_on_a_page_are_calls_that_python_takes(page: Path) -> None:
    for call in calls(page):
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(PUBLIC[call.func.id]).bind(*call.args, **keywords)


@pytest.mark.parametrize(
    "name", ["PerLayerPrecision", "OverflowMonitor", "UnderflowMonitor", "FidelityMonitor", "PrecisionReport"]
)
def test_the_longest_call_in_the_guides_says_the_defaults(name: str) -> None:
    found = [call.keywords for page in GUIDES for call in calls(page) if call.func.id == name and not call.args]
    said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in max(found, key=len)}
    parameters = inspect.signature(PUBLIC[name]).parameters
    assert said == {each: parameters[each].default for each in list(parameters)[: len(said)]}
    assert len(said) >= 2


def test_the_tables_of_options_say_the_defaults() -> None:
    adaptive = (EXAMPLES / "guides" / "adaptive.md").read_text()
    said = {each: int(value) for each, value in re.findall(r"`(\w+)=(\d+)`", adaptive)}
    parameters = inspect.signature(lightning_mixprec.AdaptivePrecision).parameters
    assert said == {each: parameters[each].default for each in said}
    assert len(said) == 4
    plugin = (EXAMPLES / "guides" / "the_plugin.md").read_text()
    (table,) = re.findall(r"\| \| default \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", plugin)
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    powers = re.compile(r"2\^(-?\d+)")
    values = {
        name: ast.literal_eval(powers.sub(lambda power: repr(2.0 ** int(power[1])), value.strip("`")))
        for names, values, _ in rows
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True)
    }
    defaults = inspect.signature(lightning_mixprec.LossScaling).parameters.values()
    assert values == {each.name: each.default for each in defaults}


def test_the_table_of_logged_keys_is_whole() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "lightning_mixprec").rglob("*.py"))
    table = re.findall(r"^\| `(mixprec/\w+)` \|", (EXAMPLES / "guides" / "monitors.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(set(re.findall(r"\bmixprec/\w+", sources)))


# YAML


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's of jsonargparse
@pages([page for page in PAGES if blocks(page, "yaml")])
def test_yaml_on_a_page_is_a_policy_or_a_config(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])  # LightningCLI warns if pytest's arguments are there
    for code in blocks(page, "yaml"):
        said = yaml.safe_load(code)
        if "trainer" not in said:
            policy = PrecisionPolicy.from_dict(said)
            assert PrecisionPolicy.from_dict(policy.to_dict()) == policy
            continue
        (tmp_path / "config.yaml").write_text(code)
        limits = ["--trainer.logger=false", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
        args = [f"--config={tmp_path / 'config.yaml'}", *limits]
        trainer = LightningCLI(pl.LightningModule, run=False, seed_everything_default=1, args=args).trainer
        assert isinstance(trainer.precision_plugin, PerLayerPrecision)
        wanted = [each["class_path"].rpartition(".")[2] for each in said["trainer"].get("callbacks", ())]
        assert set(wanted) <= {type(callback).__name__ for callback in trainer.callbacks}


# Commands, paths and links


def commands(page: Path) -> list[str]:
    """Return the commands of Python on a page: in blocks, indented, and in the middle of a line."""
    text = page.read_text()
    lines = [line.split("  #")[0] for line in text.splitlines() if re.match(r"(    )?python \S+\.py", line)]
    return [*lines, *re.findall(r"`(python \S+\.py[^`\n]*)`", text)]


@pages([page for page in PAGES if commands(page)])
def test_commands_on_a_page_name_scripts_and_configs_that_exist(page: Path) -> None:
    for command in commands(page):
        named = [word for word in shlex.split(command) if word.startswith("examples/") and "/results/" not in word]
        assert [word for word in named if not (ROOT / word).is_file()] == [], command


def paths(page: Path) -> set[str]:
    """Return the words in code on a page that are paths of this repository, by their ending and their folders."""
    words = re.findall(r"`([\w.*{},/-]+/[\w.*{},-]*)`", prose(page))
    return {word for word in words if word.endswith((".py", ".md", ".yaml", ".json", "/"))}


@pages([page for page in [*PAGES, *ROOMS] if paths(page)])
def test_paths_on_a_page_exist(page: Path) -> None:
    homes = [ROOT, EXAMPLES, EXAMPLES / "benchmarks", page.parent, ROOT / "lightning_mixprec"]

    def exists(path: str) -> bool:
        if "{" in path:
            head, choices, tail = re.fullmatch(r"(.*)\{(.*)\}(.*)", path).groups()
            return all(exists(head + choice + tail) for choice in choices.split(","))
        return any(list(home.glob(path)) if "*" in path else (home / path).exists() for home in homes)

    of_a_run = {"lightning_logs/version_N/"}
    assert sorted(path for path in paths(page) - of_a_run if not exists(path)) == []


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages([*PAGES, *ROOMS, ROOT / "CHANGELOG.md", *sorted((ROOT / "tests").glob("**/README.md"))])
def test_links_on_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# What these checks catch

PLANTED = [
    (test_python_on_a_page_imports_what_it_names, "```python\nfrom lightning_mixprec import UnderflowMeter\n```\n"),
    (test_python_on_a_page_imports_what_it_names, "```python\nmonitor = OverflowMonitor()\n```\n"),
    (test_calls_on_a_page_are_calls_that_python_takes, "Give it `OverflowMonitor(windows=3)`."),
    (test_calls_on_a_page_are_calls_that_python_takes, "```python\nx = [PrecisionReport(every=3)]\n```\n"),
    (test_commands_on_a_page_name_scripts_and_configs_that_exist, "    python examples/gtp.py fit\n"),
    (
        test_commands_on_a_page_name_scripts_and_configs_that_exist,
        "Run `python examples/gpt.py --config examples/a.yaml`.",
    ),
    (test_paths_on_a_page_exist, "It is in `lightning_mixprec/nowhere/`."),
    (test_paths_on_a_page_exist, "Three of them are `examples/configs/scheduled_*.yaml`."),
    (test_links_on_a_page_lead_somewhere, "See [the guide](guides/policy.md)."),
    (test_links_on_a_page_lead_somewhere, "# Title\n\nSee [below](#subtitle)."),
]


@pytest.mark.parametrize(("check", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_mistake_is_caught(check: Callable[[Path], None], text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((AssertionError, TypeError)):
        check(page)
