"""`arpo-trl new FOLDER`: a project with a configuration, a tool, a reward, data and a tiny model, ready to run."""

from __future__ import annotations

import os
import random
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arpo_trl.commands.project.my_tools import CAPITALS, lookup
from arpo_trl.common.files import whole_folder
from arpo_trl.common.flags import CommandParser, path_in_flag
from arpo_trl.common.full_disk import naming
from arpo_trl.common.waiting import say_loading
from arpo_trl.errors import ConfigError
from arpo_trl.quickstart.task import write_lines
from arpo_trl.visible import say

TEMPLATE = Path(__file__).with_name("project")
DEMONSTRATIONS, STEPS = 600, 250
GUESSED, MISTAKEN = 0.25, 0.15
"""Shares of the demonstrations that answer without a lookup, and that look up another country."""


def main(words: Sequence[str]) -> int:
    parser = CommandParser(
        prog="arpo-trl new",
        description="Creates a project: a configuration, a tool, a reward, questions, and a tiny model to try them "
        "with on a CPU. Takes about half a minute and downloads nothing.",
    )
    parser.add_argument("folder", type=path_in_flag, help="new folder")
    folder: Path = parser.parse_args(words).folder
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder. Choose another name.")
    with _whole_project(folder) as partial:
        _write_project(partial)
    change = f"cd {shlex.quote(str(folder))}"
    say(
        f"{folder} is ready. Next:\n\n    {change}\n    arpo-trl train --config config.yaml\n\nSee README.md for more."
    )
    return 0


@contextmanager
def _whole_project(folder: Path) -> Iterator[Path]:
    """Yields the folder to write, which becomes `folder`. After an error or Ctrl-C `folder` is as before, so that the
    command can run again."""
    if not folder.exists():
        with whole_folder(folder) as partial:
            yield partial
        return
    try:
        with naming(folder):
            yield folder  # not replaced: it may be the current folder, a link, or the root of a file system
    except BaseException:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        raise


def _write_project(folder: Path) -> None:
    for file in filter(Path.is_file, TEMPLATE.iterdir()):  # without __pycache__
        shutil.copyfile(file, folder / file.name)  # without the mode: the package's files may be read-only
    (folder / ".gitignore").write_text("/runs/\n/model/\n__pycache__/\n", "utf-8")
    demonstrations = make_demonstrations(seed=0)
    write_lines(folder / "questions.jsonl", make_questions())
    write_lines(folder / "demonstrations.jsonl", demonstrations)
    say("Makes a project, and trains a tiny model for it on the format of calls and answers, in about half a minute.")
    say_loading("arpo-trl new")
    from arpo_trl.quickstart.taught import save_taught_model

    save_taught_model(folder / "model", _texts(), demonstrations, STEPS)


def make_questions() -> list[dict[str, Any]]:
    """Rows {prompt, answer, task}, one for each country."""
    return [
        {"prompt": _question(country)["content"], "answer": [capital], "task": "qa"}
        for country, capital in CAPITALS.items()
    ]


def make_demonstrations(seed: int) -> list[dict[str, Any]]:
    """Rows {messages} that show the format. Many give a wrong answer, so that the model can still improve."""
    rng, countries = random.Random(seed), list(CAPITALS)
    rows = []
    for _ in range(DEMONSTRATIONS):
        asked, luck = rng.choice(countries), rng.random()
        if luck < GUESSED:
            rows.append({"messages": [_question(asked), _answer(CAPITALS[rng.choice(countries)])]})
            continue
        named = rng.choice(countries) if luck < GUESSED + MISTAKEN else asked
        call = {"role": "assistant", "content": f"<lookup>{named}</lookup>"}
        result = {"role": "tool", "content": lookup(named)}
        rows.append({"messages": [_question(asked), call, result, _answer(CAPITALS[named])]})
    return rows


def _question(country: str) -> dict[str, str]:
    return {"role": "user", "content": f"What is the capital of {country}?"}


def _answer(capital: str) -> dict[str, str]:
    return {"role": "assistant", "content": f"<answer>\\boxed{{{capital}}}</answer>"}


def _texts() -> list[str]:
    """The training text of the tokenizer: names with and without a space before them, often enough to become one
    token."""
    names = [*CAPITALS, *CAPITALS.values()]
    frame = "system\nuser\nassistant\ntool\nWhat is the capital of? The capital of is. <lookup></lookup> \\boxed{}"
    return [*(f"{space}{name}" for name in names for space in ("", " ") for _ in range(6)), *([frame] * 200)]
