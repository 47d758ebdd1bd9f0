"""Relative links and anchors of README and pages lead somewhere; nothing is fetched."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("[!_]*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "csrc").rglob("*.md")),
    *sorted((ROOT / "tutorials").glob("*.ipynb")),
]
INLINE_CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def text_of(path):
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def prose_of(text):
    """Without code, in which a bracket is no link; fences of directives (:::) keep their content."""
    fenced = re.sub(r"^```[^\n]*\n.*?^```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return INLINE_CODE.sub("", fenced)


def anchors_of(text):
    """What GitHub and MyST make of headings: lower case, punctuation dropped, a dash for each space."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", re.sub(r"^```.*?^```\s*$", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def target_of(link, page):
    path, _, anchor = link.partition("#")
    if path.startswith("_tutorials/") and page.parent == ROOT / "docs":  # where conf.py puts copies
        path = f"../tutorials/{path.removeprefix('_tutorials/')}"
        if not Path(path).suffix:
            path += ".ipynb"
    return (page.parent / path).resolve() if path else page, anchor


def problems_of(page):
    found = []
    for link in LINK.findall(prose_of(text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        target, anchor = target_of(link, page)
        if not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors_of(text_of(target)):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    assert problems_of(page) == []


def test_the_pages_have_links():
    assert sum(len(LINK.findall(prose_of(text_of(page)))) for page in PAGES) > 20


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#a-heading-here) [c](gone.md) [d](there.md#no-heading) `[e](code.md)`\n"
        "```\n[f](fenced.md)\n```\n[g](https://example.org/never-fetched)\n"
    )
    assert problems_of(page) == ["gone.md: no such file", "there.md#no-heading: no such heading"]


def test_every_page_of_the_docs_is_in_a_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^(\w+)$", index, flags=re.MULTILINE))
    assert {page.stem for page in (ROOT / "docs").glob("[!_]*.md")} - {"index"} <= named
