"""The house's rules, read from the source: which way imports go, who may touch which library, how long things are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorasure"
FILES = sorted(SOURCE.rglob("*.py"))
STAGES = ["data", "importance", "init", "losses", "objective", "train", "evaluate", "report"]
SHELL = {
    "pipeline",
    "train_stage",
    "fitting",
    "plan",
    "stages",
    "workbench",
    "cli",
    "flags",
    "demo",
    "finetuning",
    "show",
    "card",
    "evaluating",
    "attacking",
    "sequential",
    "probe",
    "search",
    "baselines",
    "recipes",
}
ALLOWED = {
    "peft": {"lora.py", "sites.py"},
    "safetensors": {"artifacts.py"},
    "yaml": {"yaml_file.py"},
    "jsonargparse": {"flags.py"},
    "accelerate": set(),  # it launches processes, and what it reads from their environment is not for our loop
}
PARSED = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def name_of(path):
    return path.relative_to(SOURCE).as_posix()


def imports(path):
    """Dotted names of what a file imports, its own package's without `lorasure.`, wherever the import stands."""
    found = set()
    package = ["lorasure", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(PARSED[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def own(path):
    """First name below the package of each import of our own modules."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("lorasure.")}


def test_the_reader_of_imports_sees_them():
    assert "data" in own(SOURCE / "workbench.py") and any(n.startswith("peft.") for n in imports(SOURCE / "lora.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    stage = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if stage in STAGES:
        later = set(STAGES[STAGES.index(stage) + 1 :])
        assert not own(path) & (later | SHELL)
    elif stage not in SHELL | {"__init__", "__main__"}:
        assert not own(path) & SHELL


@pytest.mark.parametrize(("library", "files"), ALLOWED.items(), ids=ALLOWED)
def test_each_library_behind_one_door(library, files):
    users = {name_of(p) for p in FILES if any(n.split(".")[0] == library for n in imports(p))}
    assert users <= files
    if library == "peft" and "sites.py" in users:
        names = {n for n in imports(SOURCE / "sites.py") if n.startswith("peft")}
        assert all(n.startswith("peft.utils") for n in names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_size_documentation_and_wildcards(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    tree = PARSED[path]
    assert path.name == "__init__.py" or ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines"


def public(node):
    """Public functions and classes of a module, and public methods long enough to need a word."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if isinstance(node, ast.Module) or len(ast.unparse(child).splitlines()) > 8:
                yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_public_name_is_documented(path):
    assert [f"{n.name}:{n.lineno}" for n in public(PARSED[path]) if not ast.get_docstring(n)] == []


def test_no_pickle_no_eval():
    for path in FILES:
        calls = {ast.unparse(n.func) for n in ast.walk(PARSED[path]) if isinstance(n, ast.Call)}
        assert not calls & {"eval", "exec", "torch.load", "torch.save", "yaml.load", "pickle.load"}, path
        assert not any(n.split(".")[0] == "pickle" for n in imports(path))
