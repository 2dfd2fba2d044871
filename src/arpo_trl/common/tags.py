"""Finds the tags in a model's text that count as text: tags inside code, and tags mentioned in prose.

    Let me use <search> for it. <search>iron</search>        the first tag is a mention, the second one is a call
    <python>print("<answer>")</python>                       everything inside code is code

Pure functions. The tag protocol and the format reward both use them, so that they agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection

CODE_PARAMETER = "code"
"""The argument name that marks a tool with one text argument as a tool for code."""


def plain_spans(text: str, tools: Collection[str], code_tools: Collection[str]) -> list[tuple[int, int]]:
    """Return the (start, end) spans of one turn in which tags count as text, in order.

    The body of a code tool extends from its opening tag to its first closing tag, or to the end of the turn. An
    opening tag that follows words on its line is a mention if a call comes after it: either the same tag opens again
    before it is closed, or the tag is never closed and another tool's call is closed.

    Args:
        text: The model's text of one turn.
        tools: The tools' names.
        code_tools: The names of the tools for code.
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
    """Return the text without these spans."""
    kept, position = [], 0
    for start, end in spans:
        kept.append(text[position:start])
        position = end
    return "".join([*kept, text[position:]])


def _named(text: str, tags: list[re.Match[str]]) -> list[bool]:
    """Return for each tag whether it is an opening tag mentioned in prose."""
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
    """Whether text other than a tag precedes `position` on its line."""
    before = position
    while before and text[before - 1] in " \t":
        before -= 1
    return before > 0 and text[before - 1] not in "\n>"
