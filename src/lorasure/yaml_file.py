"""YAML: settings of runs, searches and recipes. Written whole or not at all; read safely, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .artifacts import write_text
from .errors import DataError

NESTING = 50  # levels: far more than any file of ours has, far fewer than make its readers fail

_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):
    """Values as safe_load makes them, but a key that is there twice is an error: the first would be dropped unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def write_yaml(path: Path, value: Any) -> None:
    """YAML in the order given."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _too_much(text: str) -> str | None:
    """What makes YAML larger or deeper than it looks: aliases (a few lines stand for millions), or nesting."""
    # Text within it counts, because what reads settings tries to read every text as YAML again.
    anchored, depth = False, 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent) and anchored:
                return "aliases are not read"
            anchored = anchored or getattr(event, "anchor", None) is not None
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > NESTING:
                return f"nested deeper than {NESTING}"
            if isinstance(event, yaml.ScalarEvent) and len(event.value) < len(text) and (why := _too_much(event.value)):
                return why
    except yaml.YAMLError as error:  # text that is no YAML, or not to its end, is neither; the parser has a limit too
        return f"nested deeper than {NESTING}" if "maximum nesting" in str(error) else None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, loaded safely; a DataError if it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        if why := _too_much(text):
            raise yaml.MarkedYAMLError(problem=why)
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: not usable YAML ({error.problem}).") from error
    except Exception as error:  # a value that does not fit its tag fails in any way
        raise DataError(f"{path}: not a readable YAML file ({type(error).__name__}).") from error
