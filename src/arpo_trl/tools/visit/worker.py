"""Takes the text out of hostile HTML or PDF: a script, run in a process of its own under limits of the kernel.

Parsers have bugs, and a page can be made to need hours or all memory; here that costs this process. It imports nothing
of this package, so that it starts in a tenth of a second.

    argv[1] = html | pdf, stdin = the page   ──▶   stdout = its text, a paragraph a line
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys

CPU_LIMIT_S = 10
MEMORY_LIMIT_BYTES = 2 << 30
MAX_TEXT_CHARS = 2_000_000
MAX_PDF_PAGES = 200


def of_html(page: bytes) -> str:
    import trafilatura

    document = trafilatura.bare_extraction(page, include_comments=False, favor_recall=True, with_metadata=True)
    parts = (getattr(document, "title", None), getattr(document, "text", None))  # None where it finds no text
    return "\n".join(part for part in parts if part)


def of_pdf(page: bytes) -> str:
    import pypdf

    texts: list[str] = []
    with contextlib.suppress(pypdf.errors.PyPdfError):  # what came before a broken page is text all the same
        for part in pypdf.PdfReader(io.BytesIO(page)).pages[:MAX_PDF_PAGES]:
            texts.append(part.extract_text())
            if sum(map(len, texts)) > MAX_TEXT_CHARS:
                break
    return "\n".join(texts)


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    with contextlib.suppress(ValueError, OSError):  # not every system can limit its address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    text = {"html": of_html, "pdf": of_pdf}[sys.argv[1]](sys.stdin.buffer.read())
    sys.stdout.buffer.write(text[:MAX_TEXT_CHARS].encode("utf-8", "replace"))


if __name__ == "__main__":
    main()
