"""Marked sections of the documents, which tools fill from the files that they measured."""

import re
from pathlib import Path


def replace_sections(page: Path, sections: dict[str, list[str]]) -> None:
    """Fill what lies between `<!-- name -->` and `<!-- /name -->` in `page`.

    Args:
        page: a Markdown file.
        sections: the lines by the name of the section.

    Raises:
        KeyError: a section that `page` does not have.
    """
    text = page.read_text(encoding="utf-8")
    for name, lines in sections.items():
        marked = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        if not marked.search(text):
            raise KeyError(f"{page}: no section {name}")
        text = marked.sub(lambda found, lines=lines: found[1] + "".join(f"{line}\n" for line in lines) + found[2], text)
    page.write_text(text, encoding="utf-8")
