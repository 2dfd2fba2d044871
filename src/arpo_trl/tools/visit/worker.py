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
import io
import json
import logging
import re
import sys

from arpo_trl.tools.visit.excerpts import excerpt

CPU_LIMIT_S = 10
MEMORY_LIMIT_BYTES = 2 << 30
MAX_TEXT_CHARS = 2_000_000
MAX_PDF_PAGES = 200
_STATES_ENCODING = re.compile(rb"<meta[^>]+charset", re.IGNORECASE)
_HEAD_BYTES = 4096
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""The first bytes of pages that state their encoding themselves."""


def of_html(page: bytes) -> str:
    import trafilatura

    document = trafilatura.bare_extraction(page, include_comments=False, favor_recall=True, with_metadata=True)
    parts = (getattr(document, "title", None), getattr(document, "text", None))  # None if it finds no text
    return "\n".join(part for part in parts if part)


def of_pdf(page: bytes) -> str:
    import pypdf

    texts: list[str] = []
    with contextlib.suppress(pypdf.errors.PyPdfError):  # keep the text before a broken page
        for part in pypdf.PdfReader(io.BytesIO(page)).pages[:MAX_PDF_PAGES]:
            texts.append(part.extract_text())
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
