"""The flags of the commands have one name each."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from pathlib import Path

import pytest

from arpo_trl import cli
from arpo_trl.command_line import parse_settings
from arpo_trl.commands.launch import OWN_FLAGS, split_words
from arpo_trl.common.flags import NEAR, CommandParser, nearest
from arpo_trl.common.parser import SettingsParser
from arpo_trl.errors import ConfigError
from arpo_trl.quickstart.__main__ import _arguments as quickstart_arguments
from arpo_trl.tools.builtin import ToolArguments
from support import script
from test_architecture import modules


def parser() -> CommandParser:
    made = CommandParser(prog="arpo-trl show")
    commands = made.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.add_argument("folder")
    run.add_argument("--output")
    run.add_argument("--step", type=int)
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "there is no flag --out; did you mean --output?"),
        (["--out=x"], "there is no flag --out; did you mean --output?"),
        (["--outptu", "x"], "there is no flag --outptu; did you mean --output?"),
        (["--verbose"], "there is no flag --verbose; expected --help or --output or --step"),
        (["-q"], "there is no flag -q; expected --help or --output or --step"),
        (["other"], "'other' is one word too many."),
        (["--step", "last"], "argument --step: 'last'; expected an integer"),
    ],
)
def test_a_wrong_word_of_a_command_is_an_error_that_names_the_right_one(capsys, words, message) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["run", "folder", *words])
    assert ended.value.code == 2
    assert f"arpo-trl show run: error: {message}" in capsys.readouterr().err


def test_right_words_are_parsed() -> None:
    assert vars(parser().parse_args(["run", "folder", "--step=3"])) == {"folder": "folder", "output": None, "step": 3}


def test_no_parser_takes_abbreviations() -> None:
    made = [
        (module, ast.unparse(node))
        for module, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("ArgumentParser", "TrlParser")
    ]
    assert [module for module, call in made if "allow_abbrev=False" not in call] == []
    assert not SettingsParser((ToolArguments,)).allow_abbrev
    commands = next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert len(commands.choices) > 10 and not any(each.allow_abbrev for each in commands.choices.values())


def test_a_path_in_a_flag_may_begin_with_the_home_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("tools: [python]\n")
    parsed = cli._parser().parse_args(["plot", "run", "--output=~/a.png"])
    assert (parsed.runs, parsed.output) == ([Path("run")], tmp_path / "a.png")
    assert quickstart_arguments(["--output=~/q"]).output == tmp_path / "q"
    config = str(tmp_path / "c.yaml")
    assert split_words(["--config=~/c.yaml", "--config_file=~/c.yaml"]) == (
        ["--config_file", config],
        ["--config", config],
    )
    assert parse_settings((ToolArguments,), ["--config=~/c.yaml"])[0].tools == ["python"]


def test_no_parser_takes_a_path_as_it_is() -> None:
    """`path_in_flag` does what a shell does not do after --flag=."""
    keywords = [
        (module, each) for module, tree in modules() for each in ast.walk(tree) if isinstance(each, ast.keyword)
    ]
    assert [module for module, each in keywords if ast.unparse(each) == "type=Path"] == []


def test_a_shortened_setting_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match="There is no setting 'search_ind'; did you mean 'search_index'"):
        parse_settings((ToolArguments,), ["--search_ind", "corpus.jsonl"])


@pytest.mark.parametrize(
    "words",
    [
        ["--search-fields", "title", "--search-fields", "url"],
        ["--search-fields=title", "--search-fields=url"],
        ["--search-fields", "title", "--search_fields=url"],
    ],
)
def test_a_list_that_is_given_twice_is_an_error(words: list[str]) -> None:
    with pytest.raises(
        ConfigError, match="--search-fields is given 2 times; expected all values after one --search-f"
    ):
        parse_settings((ToolArguments,), words)


def test_no_setting_is_taken_for_a_misspelt_flag_of_the_launcher() -> None:
    kinds = [kind for program in ("train", "sft") for kind in script(program).SETTINGS]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert [name for name in names if nearest(name, OWN_FLAGS, cutoff=NEAR)] == []
