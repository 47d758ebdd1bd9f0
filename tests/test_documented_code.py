"""Code in README and pages, without running it: its functions exist and take the arguments, its commands the options."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import nbformat
import pytest

import scfm
from scfm.cli._registry import find_commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "tutorials").glob("*.ipynb"))]
FENCE = re.compile(r"^[ *-]*```(\w*)[^\n]*\n(.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)


def blocks_of(page, languages):
    """Fenced code of a page, each with the indentation of its list item taken away."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    return [inspect.cleandoc(body) for language, body in FENCE.findall(text) if language in languages]


def calls_of(code):
    """(Dotted name, names of keyword arguments) of each call of `scfm`'s functions."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if re.fullmatch(r"scfm(\.\w+)+", name):
                yield name, [keyword.arg for keyword in node.keywords if keyword.arg]


def problem_of(name, keywords):
    found = scfm
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            return f"{name} does not exist"
        found = getattr(found, part)
    taken = inspect.signature(found).parameters
    unknown = [keyword for keyword in keywords if keyword not in taken]
    return f"{name} does not take {', '.join(unknown)}" if unknown else None


def python_of(page):
    for code in blocks_of(page, {"python"}):
        try:
            ast.parse(code)
        except SyntaxError:
            assert "..." in code, code  # shortened on purpose
        else:
            yield code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_functions_in_examples_exist_and_take_their_arguments(page):
    problems = [problem_of(*call) for code in python_of(page) for call in calls_of(code)]
    assert [problem for problem in problems if problem] == []


def commands_of(page):
    for block in blocks_of(page, {"bash", ""}):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("$(which scfm)", "scfm"), comments=True)
            if "scfm" in words and (words[0] == "scfm" or words[0] == "torchrun"):
                yield words[words.index("scfm") + 1 :]


@pytest.fixture(scope="module")
def options():
    """The options of each command, as its help lists them."""
    from scfm.cli._app import build_app

    app = build_app()

    def of(command):
        arguments = app[command].assemble_argument_collection()
        return {name for argument in arguments for name in argument.names if name.startswith("--")}

    return {command: of(command) for command in find_commands()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_examples_exist_and_take_their_options(page, options):
    for command, *arguments in commands_of(page):
        assert command in options
        asked = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert asked <= options[command] | {"--help"}, command


def test_there_is_code_to_check():
    assert sum(len(list(calls_of(code))) for page in PAGES for code in python_of(page)) > 30
    assert sum(len(list(commands_of(page))) for page in PAGES) > 10


def test_what_does_not_exist_is_found():
    assert problem_of("scfm.tl.embed", ["hidden_layer"]) is None
    assert problem_of("scfm.tl.embed", ["hidden_layers"]) == "scfm.tl.embed does not take hidden_layers"
    assert problem_of("scfm.tl.embedd", []) == "scfm.tl.embedd does not exist"


def test_names_of_the_api_page_exist():
    names = re.findall(r"^   (scfm\.[\w.]+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert len(names) > 60
    assert [name for name in names if problem_of(name, [])] == []
    assert len(names) == len(set(names))
