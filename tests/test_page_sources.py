"""A command on a page that trains with the search tool says what it searches."""

from __future__ import annotations

from pathlib import Path

import pytest

from arpo_trl.command_line import parse_settings
from arpo_trl.commands.launch import split_words
from arpo_trl.tools.builtin import ToolArguments
from support import script
from test_docs import commands, named

ROOT = Path(__file__).parents[1]
SOURCES = ("search_index", "search_recorded", "search_provider")
WITH_CONFIG = [
    (where, words[1 + ("train.py" not in words[0]) :])
    for where, words in (*commands("train.py"), *commands("arpo-trl train"))
    if "--config" in words
]


def test_the_pages_have_such_commands() -> None:
    assert len(WITH_CONFIG) > 20


@pytest.mark.parametrize(("where", "words"), WITH_CONFIG, ids=named)
def test_a_command_that_searches_names_one_source(
    where: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = words[words.index("--config") + 1]
    if config in ("my.yaml", "config.yaml"):  # the reader's own
        return
    _, rest = split_words(words)
    tools: ToolArguments = parse_settings(script("train").SETTINGS, [*rest, "--use_cpu", "true"])[1]
    assert "search" not in tools.tools or sum(getattr(tools, source) is not None for source in SOURCES) == 1
