"""Adds to the site the pages that stand outside docs/, and the API reference.

README.md becomes the overview, CONTRIBUTING.md and CHANGELOG.md become pages, and each notebook becomes a page of its
text, code and printed output. Links between all of these work in the repository and in the site.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import arpo_trl

ROOT = Path(__file__).parents[2]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_TAG = re.compile(r"<[^>]+>")
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=notebook_page(notebook)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to files of the repository by links to their pages. Of links to other files the text remains."""
    home = Path(page.file.src_uri).parent

    def in_site(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = None if "://" in target else repository_path(page.file.src_uri, target)
        if path is None:
            return found[0]
        uri = site_uri(path)
        if files.get_file_from_path(uri):
            return f"[{text}]({relative(uri, home)}{anchor})"
        return text if (ROOT / path).exists() else found[0]  # what is missing is reported by the build

    return _LINK.sub(in_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Gives each cell of a table its column's heading, which site.css shows on a phone, where rows are blocks."""

    def labelled(table: re.Match[str]) -> str:
        heads = [_TAG.sub("", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", table[0], re.DOTALL)]
        rows = re.split("(?=<tr)", table[0])
        for i, row in enumerate(rows):
            parts = row.split("<td")
            labels = [f'<td data-label="{head}"' for head in heads]
            rows[i] = parts[0] + "".join(map("".join, zip(labels, parts[1:], strict=False)))
        return "".join(rows)

    return re.sub(r"<table>.*?</table>", labelled, html, flags=re.DOTALL)


def repository_path(page: str, target: str) -> str | None:
    """What a link of a page leads to, as a path from the repository's root; None if it leads outside."""
    outside = {made: source for source, made in OUTSIDE.items()}
    if page in outside:
        source = ROOT / outside[page]
    elif page.startswith("notebooks/"):
        source = ROOT / page
    else:
        source = ROOT / "docs" / page
    path = (source.parent / target).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else None


def site_uri(path: str) -> str:
    """The page of a file of the repository."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def relative(uri: str, home: Path) -> str:
    return "/".join([*[".."] * len(home.parts), uri])


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the text that the code printed."""
    notebook = json.loads(path.read_text("utf-8"))
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else fenced("python", text))
        parts += [fenced("text", printed(output)) for output in cell.get("outputs", [])]
    return "\n\n".join([*parts, f"This page is `notebooks/{path.name}`.", ""])


def printed(output: dict[str, Any]) -> str:
    return "".join(output.get("text") or output["data"]["text/plain"]).rstrip()


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def reference() -> str:
    """A page with the docstrings of all public names."""
    head = "# API\n\nThe docstrings of the [public names](api.md), from the code.\n"
    names = sorted(arpo_trl.__all__, key=str.lower)
    return "\n".join([head, *[f"::: arpo_trl.{name}" for name in names], ""])
