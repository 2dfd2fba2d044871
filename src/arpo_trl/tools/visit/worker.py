"""A script that reads an untrusted page in a separate process, under limits of the kernel.

Parsers have bugs, and a hostile page can make a parser, or the search for the best windows, use hours or all memory.
Here this terminates only the separate process. The script has few imports, so that it starts in a tenth of a second.

    argv = html | pdf | text, the encoding that the server states or "", maximum characters of each excerpt…
    stdin = the goal as a line of JSON, then the page
      ──▶  stdout = JSON: for each maximum, the excerpt of the page that matches the goal
"""

from __future__ import annotations

import codecs
import contextlib
import html
import io
import json
import logging
import re
import sys
from typing import Any

from arpo_trl.tools.superscripts import LOOK_BACK, is_power
from arpo_trl.tools.visit.excerpts import excerpt

CPU_LIMIT_S = 10
MEMORY_LIMIT_BYTES = 2 << 30
MAX_TEXT_CHARS = 2_000_000
MAX_PDF_PAGES = 200
MAX_DEPTH = 250
"""Elements nested deeper become paragraphs: the time of trafilatura grows fast with the depth, and it recurses. The
parser reads 2,048 levels."""
_STATES_ENCODING = re.compile(rb"<meta[^>]+charset", re.IGNORECASE)
_HEAD_BYTES = 4096
_TAG = re.compile(r"<[a-z!/?]", re.IGNORECASE)
_DOCTYPE = re.compile(r"\A\s*<!doctype[^>]*>", re.IGNORECASE)  # some versions of the parser stumble over it
_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_INLINE = frozenset(
    "a abbr b bdi bdo big cite code data del dfn em font i ins kbd mark q s samp small span strike strong sub sup "
    "time tt u var wbr".split()
)
"""Elements that do not begin a paragraph."""
_UNSEEN = frozenset(("noscript", "script", "style", "template", "title"))
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""The first bytes of pages that state their encoding themselves."""


def of_html(page: bytes) -> str:
    import lxml.html
    import trafilatura
    from trafilatura.utils import decode_file

    text = _NOT_IN_XML.sub("", decode_file(page)).removeprefix("\ufeff")
    if not _TAG.search(text):  # plain text, for which many servers state HTML or nothing
        return html.unescape(text)
    parser = lxml.html.HTMLParser(
        huge_tree=True,  # without it, everything after 256 nested elements is lost
        collect_ids=False,
        default_doctype=False,
        encoding="utf-8",
        remove_comments=True,
        remove_pis=True,
    )
    try:
        tree = lxml.html.document_fromstring(_DOCTYPE.sub("", text).encode("utf-8", "replace"), parser=parser)
    except lxml.etree.ParserError:  # nothing but comments
        return ""
    _write_powers(tree)
    _flatten(tree)
    document = trafilatura.bare_extraction(tree, include_comments=False, favor_recall=True, with_metadata=True)
    title, main = getattr(document, "title", None), getattr(document, "text", None)  # None if it finds no text
    return "\n".join(part for part in (title, main or "\n".join(_paragraphs(tree))) if part)


def _write_powers(tree: Any) -> None:
    """Write ^ before powers, and make superscripts and subscripts a part of the text around them."""
    from lxml import etree

    before = ""
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        if event == "start" and element.tag == "sup":
            raised = element.text or (element[0].text if len(element) else "") or ""
            if is_power(before, raised):
                element.text = "^" + (element.text or "")
        if element.tag not in _INLINE:
            before = ""
        text = element.text if event == "start" else element.tail
        before = (before + (text or "")[-LOOK_BACK:])[-LOOK_BACK:]
    etree.strip_tags(tree, "sub", "sup")


def _flatten(tree: Any) -> None:
    """Replace what is in the elements at `MAX_DEPTH` by its paragraphs."""
    from lxml import etree

    level, deep = 0, []
    walk = etree.iterwalk(tree, events=("start", "end"))
    for event, element in walk:
        level += 1 if event == "start" else -1
        if event == "start" and level == MAX_DEPTH and len(element):
            deep.append(element)
            walk.skip_subtree()
    for element in deep:
        paragraphs = _paragraphs(element)
        for child in list(element):
            element.remove(child)
        element.text = None
        for paragraph in paragraphs:
            etree.SubElement(element, "p").text = paragraph


def _paragraphs(tree: Any) -> list[str]:
    """Return the texts of an element, without scripts and styles."""
    from lxml import etree

    paragraphs: list[list[str]] = [[]]
    walk = etree.iterwalk(tree, events=("start", "end"))
    for event, element in walk:
        if element.tag not in _INLINE:
            paragraphs.append([])
        if event == "start" and element.tag in _UNSEEN:
            walk.skip_subtree()
        elif event == "start":
            paragraphs[-1].append(element.text or "")
        elif element is not tree:
            paragraphs[-1].append(element.tail or "")
    texts = (" ".join("".join(parts).split()) for parts in paragraphs)
    return [text for text in texts if text]


def of_pdf(page: bytes) -> str:
    import pypdf

    texts: list[str] = []
    with contextlib.suppress(pypdf.errors.PyPdfError):  # a broken file has no pages
        pages = pypdf.PdfReader(io.BytesIO(page)).pages
        for number in range(min(len(pages), MAX_PDF_PAGES)):
            with contextlib.suppress(Exception):  # a broken page can raise anything; the others remain
                texts.append(pages[number].extract_text())
            if sum(map(len, texts)) > MAX_TEXT_CHARS:
                break
    return "\n".join(texts)


def of_text(page: bytes) -> str:
    is_utf_16 = page.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return page.decode("utf-16" if is_utf_16 else "utf-8-sig", "replace")


def in_utf_8(page: bytes, stated: str, kind: str) -> bytes:
    """The page in UTF-8, if it is in the encoding that the server states.

    Many servers state a default, Latin-1, which every page can be decoded with. So it does not count if the page is
    valid UTF-8, which other text almost never is, or states an encoding itself. As in browsers, it means cp1252.
    """
    if not page.isascii():
        with contextlib.suppress(UnicodeError):
            page.decode()
            return page
    encodings = [stated]
    if stated in ("iso8859-1", "ascii"):
        if kind == "html" and _STATES_ENCODING.search(page[:_HEAD_BYTES]):
            return page
        encodings = ["cp1252", "latin-1"]
    for encoding in encodings:
        with contextlib.suppress(LookupError, UnicodeError):  # unknown, or not that of the page
            return page.decode(encoding).encode()
    return page


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    with contextlib.suppress(ValueError, OSError):  # some systems cannot limit the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    kind, stated, *sizes = sys.argv[1:]
    goal = json.loads(sys.stdin.buffer.readline())
    page = sys.stdin.buffer.read()
    if stated and kind != "pdf" and not page.startswith(_MARKS):
        page = in_utf_8(page, stated, kind)
    text = {"html": of_html, "pdf": of_pdf, "text": of_text}[kind](page)[:MAX_TEXT_CHARS]
    text = text.encode("utf-8", "replace").decode()  # without lone surrogates
    print(json.dumps([excerpt(text, goal, int(size)) for size in sizes]))


if __name__ == "__main__":
    main()
