"""Policies in YAML files: read with line numbers, written atomically."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.records.atomic_files import path_of, write_text

_MAX_DEPTH = 6
_UNQUOTED_STAR = re.compile(r"(?:^|[\s,\[{])(\*(?:\[[^\]\s]*\]|[^\s:,#\]}]|:(?=\S))*)")


class Document:
    """A YAML file that was read.

    Attributes:
        path: The file.
        lines: The line of each part, by its path of keys and list positions; the empty path is the whole document.
        content: Its content, of plain types.
    """

    def __init__(self, path: str, node: yaml.Node) -> None:
        self.path = path
        self.lines: dict[tuple[str | int, ...], int] = {}
        self.content = self._read(node, ())

    def where(self, path: tuple[str | int, ...]) -> str:
        """File and line of a part, or of the nearest part around it."""
        while path not in self.lines:
            path = path[:-1]
        return f"{self.path}:{self.lines[path]}"

    def _read(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if len(path) > _MAX_DEPTH:
            raise self._error(node, "nested deeper than a policy is")
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read(item, (*path, place)) for place, item in enumerate(node.value)]
        return self._read_scalar(node, path)

    def _read_mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in result:
                raise self._error(key_node, f"key {key!r} stands here a second time; leave one out")
            here = (*path, key)
            self.lines[here] = key_node.start_mark.line + 1
            result[key] = self._read(value_node, here)
        return result

    def _key(self, node: yaml.Node) -> str:
        if node.tag == "tag:yaml.org,2002:merge":
            raise self._error(node, "'<<' merges are not read; write the keys out")
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "a key that begins with '[' or '{' must be quoted, as in \"[0:4].norm\"")
        return str(node.value)

    def _read_scalar(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError):
            raise self._error(node, f"cannot read {node.value!r}; write a plain value, in quotes if need be") from None
        if value is None:
            key = str(path[-1]) if path else "the file"
            shown = key if key.isprintable() else repr(key)
            raise self._error(node, f"{shown} has no value; write one or leave it out")
        return value

    def _error(self, node: yaml.Node, problem: str) -> PolicyError:
        return PolicyError(f"{self.path}:{node.start_mark.line + 1}: {problem}")


def read(path: str | os.PathLike[str]) -> Document:
    """Read a YAML file.

    Raises:
        PolicyError: the file cannot be read or is no valid YAML; the message names file and line.
    """
    text = _read_text(path_of(path, "a policy"))
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise PolicyError(_syntax_error(os.fspath(path), text, error)) from None
    if node is None:
        raise PolicyError(f"{os.fspath(path)}:1: the file is empty; write at least a default, as in default: bf16")
    return Document(os.fspath(path), node)


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a YAML file, complete or not at all."""
    text = yaml.dump(
        dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False
    )
    write_text(path_of(path, "a policy"), text)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PolicyError(f"the policy file {os.fspath(path)} does not exist; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise PolicyError(f"{os.fspath(path)} is no UTF-8 text; a policy file is YAML") from None
    except OSError as error:
        raise PolicyError(f"cannot read {os.fspath(path)}: {error.strerror}; give the path of a YAML file") from None


class _Dumper(yaml.SafeDumper):
    """Escapes what is not printable; PyYAML would take some of it for a line break when it reads it again."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _syntax_error(path: str, text: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return f"{path}:1: no valid YAML: {' '.join(str(error).split())}; a policy file is plain text"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if line.lstrip().startswith("\t") or (line[: mark.column + 1].strip() == "" and "\t" in line):
        return f"{path}:{mark.line + 1}: indented with a tab; YAML wants blanks"
    problem = getattr(error, "problem", None) or "cannot be read"
    if "alias" in f"{problem} {getattr(error, 'context', '')}" and (found := _UNQUOTED_STAR.search(line)):
        return f"{path}:{mark.line + 1}: a pattern that begins with '*' must be quoted: write \"{found.group(1)}\""
    return f"{path}:{mark.line + 1}: no valid YAML: {problem}; quote names that have special characters"
