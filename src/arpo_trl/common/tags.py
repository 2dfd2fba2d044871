"""Which tags in a model's text are only text: those inside code, and those that prose names.

    Let me use <search> for it. <search>iron</search>        the first tag is named, the second one calls
    <python>print("<answer>")</python>                       what stands inside code is code

Pure. The tag protocol and the reward for the format read tags with it, so that they agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection

CODE_PARAMETER = "code"
"""A tool whose one text argument has this name takes code."""


def plain_spans(text: str, tools: Collection[str], code_tools: Collection[str]) -> list[tuple[int, int]]:
    """(start, end) of the stretches of one turn whose tags are text, in order.

    A code tool's body runs from its opening tag to the first closing one, or to the end of the turn. An opening tag
    that follows words on its line is named by prose where a call comes after it: the same tag opens again before it is
    closed, or it is never closed and another tool's call is.

    Args:
        text: What a model wrote in one turn.
        tools: Names of the tools.
        code_tools: Those of them that take code.
    """
    if not tools:
        return []
    tags = list(re.finditer(rf"<(/?)({'|'.join(map(re.escape, tools))})>", text))
    named = _named(text, tags)
    spans: list[tuple[int, int]] = []
    body: str | None = None  # the code tool whose body this is
    inside: str | None = None  # the other tool whose tag is open
    start = 0
    for tag, is_named in zip(tags, named, strict=True):
        closing, name = tag.groups()
        if body is not None:
            if closing and name == body:
                spans.append((start, tag.start()))
                body = None
        elif closing:
            inside = None if name == inside else inside
        elif is_named:
            spans.append(tag.span())
        elif inside is None and name in code_tools:
            body, start = name, tag.end()
        else:
            inside = inside or name
    if body is not None:
        spans.append((start, len(text)))
    return spans


def without(text: str, spans: Collection[tuple[int, int]]) -> str:
    """The text without those stretches."""
    kept, position = [], 0
    for start, end in spans:
        kept.append(text[position:start])
        position = end
    return "".join([*kept, text[position:]])


def _named(text: str, tags: list[re.Match[str]]) -> list[bool]:
    """For each tag whether it is an opening one that prose names."""
    named = [False] * len(tags)
    after: dict[str, str] = {}
    """Tool → its first tag after the current one: "" an opening, "/" a closing one."""
    closed: set[str] = set()
    """Tools with a closing tag after the current one."""
    called: set[str] = set()
    """Tools with an opening tag and a closing one after that."""
    for i in range(len(tags) - 1, -1, -1):
        closing, name = tags[i].groups()
        if closing:
            closed.add(name)
        else:
            reopened = after.get(name) == "" and name in closed
            never_closed = name not in closed and bool(called - {name})
            named[i] = (reopened or never_closed) and _follows_words(text, tags[i].start())
            if name in closed:
                called.add(name)
        after[name] = closing
    return named


def _follows_words(text: str, position: int) -> bool:
    """Whether something other than a tag stands before `position` on its line."""
    before = position
    while before and text[before - 1] in " \t":
        before -= 1
    return before > 0 and text[before - 1] not in "\n>"
