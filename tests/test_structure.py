"""The architecture, read from the imports: no circles, one direction, and families known to their own package alone."""

import ast
import re
from pathlib import Path

import pytest

import scfm

ROOT = Path(scfm.__file__).parent
# A package may import from packages of a lower level only.
LEVELS = {
    name: level
    for level, names in enumerate(
        [
            "errors _docs _lazy _registry _remote",
            "_config _files _untrusted extension",
            "vocab ops datasets",
            "data nn",
            "encoding",
            "baselines models",
            "objectives",
            "families",
            "train pp",
            "annotation perturbation",
            "tl pl",
            "cli",
        ]
    )
    for name in names.split()
}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports_of(module):
    """Modules of scfm that `module` imports when it runs; imports for type checkers alone do not count."""
    tree = ast.parse(FILES[module].read_text())
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scfm"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)


GRAPH = {module: {name for name in imports_of(module) if name in FILES and name != module} for module in FILES}


def code_without_texts(path):
    """Source of a file without its docstrings and comments."""
    return re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)


def test_no_module_imports_itself_through_others():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for name in sorted(GRAPH[module]):
            visit(name)
        path.pop()
        done.add(module)

    for module in sorted(GRAPH):
        visit(module)


def test_imports_point_one_way():
    def package(module):
        return module.split(".")[1] if "." in module else None

    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if (here := package(module)) and (there := package(name)) and here != there and LEVELS[there] >= LEVELS[here]
    ]
    assert wrong == []


@pytest.mark.parametrize("family", ["geneformer", "scgpt", "scbert", "scfoundation"])
def test_no_code_outside_of_families_depends_on_the_name_of_a_family(family):
    naming = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "families" not in path.parts and re.search(rf"""["']{family}["']""", code_without_texts(path))
    ]
    assert naming == []


def test_no_code_outside_of_encodings_branches_on_their_kind():
    branching = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "encoding" not in path.parts and re.search(r"encoding[\w.]*\.kind\s*(==|!=|in)\s", code_without_texts(path))
    ]
    assert branching == []
