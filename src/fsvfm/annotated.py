"""``--cfg job`` with what each setting means and which file, or the command line, gave it its value.

The comments are those of the YAML files in ``configs/``: beside a key, on lines of their own above it at its
indentation, or continued below it further to the right. The first lines of a file are about all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Key = tuple[str, ...]
#: Column where comments begin, beyond which they follow the value after two spaces.
_COLUMN = 44


class Comments(NamedTuple):
    """Comments of a YAML file: about all of it, and by key; ``leaves`` are all keys with a plain value or a list."""

    header: str
    by_key: dict[Key, str]
    leaves: list[Key]


def _keys(node: yaml.Node | None, path: Key = ()) -> Iterator[tuple[Key, yaml.Node, yaml.Node]]:
    """(path, key, value) of every entry of nested mappings."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            yield here, key, value
            yield from _keys(value, here)


def read_comments(text: str) -> Comments:
    """Collect the comments of a YAML file.

    Several keys in one line, as in ``{a: 1, b: 2}  # why``, share the comment beside them.
    """
    lines = text.splitlines()
    ends: dict[int, int] = {}  # where a line's last token ends; what follows there is a comment
    for token in yaml.scan(text):
        ends[token.end_mark.line] = max(ends.get(token.end_mark.line, 0), token.end_mark.column)
        for number in range(token.start_mark.line + 1, token.end_mark.line):
            ends[number] = len(lines[number])  # inside a text of several lines
    beside = {}
    for number, line in enumerate(lines):
        rest = re.sub(r"^\s*[>|][+-]?\s", "", line[ends.get(number, 0) :]).strip()
        if rest.startswith("#"):
            beside[number] = rest
    alone = {number for number in beside if lines[number].lstrip().startswith("#")}

    first = next((n for n, line in enumerate(lines) if line.strip() and n not in alone), len(lines))
    header = [beside[n] for n in range(first) if n in alone and not beside[n].startswith("# @package")]
    found: dict[Key, str] = {}
    leaves = []
    for path, key, value in _keys(yaml.compose(text)):
        row, column = key.start_mark.line, key.start_mark.column
        if not isinstance(value, yaml.MappingNode) or not value.value:
            leaves.append(path)
        above, below = row, row + 1
        while above - 1 >= first and above - 1 in alone and lines[above - 1].index("#") == column:
            above -= 1
        while below in alone and lines[below].index("#") > column:
            below += 1
        shared = isinstance(value, yaml.MappingNode) and value.value and value.start_mark.line == row
        parts = [beside[n] for n in range(above, below) if n in beside and not (n == row and shared)]
        if parts:
            found[path] = _join(parts)
    return Comments(_join(header), found, leaves)


def _join(parts: list[str]) -> str:
    return " ".join(part.lstrip("#").strip() for part in parts)


def _text(source: Any, name: str) -> str | None:
    """A configuration file as a source of Hydra's search path has it."""
    if source.scheme() == "pkg":
        root: Any = resources.files(source.path.replace("/", "."))
    elif source.scheme() == "file":
        root = Path(source.path)
    else:
        return None
    file = root / f"{name}.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def annotate(shown: str, loader: Any, config_name: str, overrides: list[str]) -> str:
    """Add comments to a configuration that Hydra printed.

    Args:
        shown: YAML; with ``# @package a.b`` in its first line it is that part of the configuration.
        loader: Hydra's configuration loader.
        config_name: the primary configuration.
        overrides: the command line's.

    Returns:
        YAML with the same content.
    """
    from hydra.types import RunMode

    plan = loader.compute_defaults_list(config_name, overrides, RunMode.RUN)
    meaning: dict[Key, str] = {}
    origin: dict[Key, list[str]] = {}
    for default in plan.defaults:
        name = str(default.config_path)
        texts = (_text(source, name) for source in loader.get_sources() if source.provider != "hydra")
        text = next((text for text in texts if text is not None), None)
        if text is None:
            continue
        package = tuple(default.package.split(".")) if default.package else ()
        comments = read_comments(text)
        if comments.header and package:
            meaning[package] = comments.header
        for path, comment in comments.by_key.items():
            meaning[package + path] = comment
        for path in comments.leaves:
            origin.setdefault(package + path, []).append(name)
    for override in plan.config_overrides:
        origin.setdefault(tuple(override.key_or_group.split(".")), []).append("command line")

    first = shown.partition("\n")[0]
    package = tuple(first.removeprefix("# @package ").split(".")) if first.startswith("# @package ") else ()
    lines = shown.splitlines()
    for path, key, value in reversed(list(_keys(yaml.compose(shown)))):
        number, told = key.start_mark.line, meaning.get(package + path, "")
        sources = origin.get(package + path, [])
        if len(sources) > 1 or sources == ["command line"]:
            told = f"{told} [{sources[-1]}]".strip()
        if not told:
            continue
        if isinstance(value, yaml.ScalarNode) and value.end_mark.line != number:
            lines.insert(number, " " * key.start_mark.column + f"# {told}")  # a long text goes on in the next line
        else:
            lines[number] = f"{lines[number].ljust(_COLUMN - 2)}  # {told}"
    return "\n".join(lines) + "\n"
