"""Faults of built pages that Sphinx does not report: `python docs/check_pages.py docs/_build/html`.

Backticks outside code are markup that was not understood. A section Returns that became a field was read as a list of types, and each
line of its text as one item.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

CODE = {"code", "pre", "script", "style", "title"}
VOID = {"br", "img", "input", "link", "meta", "hr", "source", "col", "wbr", "path", "area", "base"}


class Prose(HTMLParser):
    """Collects the text outside code."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if not set(self.open) & CODE:
            self.texts.append(text)


def faults_of(html: str) -> list[str]:
    """Sentences about what is wrong with a page."""
    prose = Prose()
    prose.feed(html)
    found = [f"backtick in {text.strip()[:80]!r}" for text in prose.texts if "`" in text]
    if re.search(r'<dt class="field-\w+">Returns', html):
        found.append("a section Returns is a list")
    return found


def main(folder: Path) -> int:
    faults = 0
    for path in sorted(folder.rglob("*.html")):
        for fault in faults_of(path.read_text(encoding="utf-8")):
            sys.stderr.write(f"{path.relative_to(folder)}: {fault}\n")
            faults += 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
