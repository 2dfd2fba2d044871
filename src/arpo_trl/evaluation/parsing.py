"""Reads the command line of `arpo-trl eval`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from arpo_trl.command_line import parse_settings
from arpo_trl.common.flags import CommandParser
from arpo_trl.common.settings import default_of
from arpo_trl.visible import say

USAGE = "arpo-trl eval --model MODEL (--benchmarks NAMES | --suite SUITE | --data PATH) [options]"


def help_parser() -> argparse.ArgumentParser:
    """Prints the help of `arpo-trl eval`. `parse_settings` does the parsing."""
    from arpo_trl.evaluation.settings import GROUPS, EvalSettings

    parser = CommandParser(
        prog="arpo-trl eval",
        usage=USAGE,
        description="Answers questions with the tools, as in training but without branching, and scores the answers.",
        epilog="The settings of tools are those of train.py: --tools search python, --search-index FILE, "
        "--search-top-k 10, --search-provider NAME, --search-recorded FILE, --python-timeout-s 5, --allow-unsafe and "
        "others (docs/tools.md). The YAML file of --config may contain every setting, with _ for -. Flags take "
        "precedence. Exit status: 0 success, 1 some samples failed, 2 usage error.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    group: Any = parser
    # A dataclass lists inherited fields first. Here these are the fields shared with training. The help lists them
    # last.
    settings = dataclasses.fields(EvalSettings)
    for setting in sorted(settings, key=lambda setting: setting.name not in EvalSettings.__annotations__):
        if setting.name in GROUPS:
            group = parser.add_argument_group(GROUPS[setting.name])
        default = default_of(setting)
        if isinstance(default, list | dict):
            default = " ".join(default)
        text = setting.metadata["help"]
        if default not in (None, False, "") and "default" not in text:
            text += f" (default: {default})"
        metavar = setting.metadata.get("metavar", setting.name.split("_")[-1].upper())
        kind: Any = {"action": "store_true"} if default is False else {"metavar": metavar}
        group.add_argument(f"--{setting.name.replace('_', '-')}", help=text, **kind)
    return parser


def parse_evaluation(words: Sequence[str]) -> tuple[Any, Any]:
    """The `EvalSettings` and `ToolArguments` of a command line, with a run's settings as defaults.

    Prints these settings in one line to standard error.
    """
    from arpo_trl.evaluation.settings import EvalSettings
    from arpo_trl.publishing.trained_settings import EvaluationSettings
    from arpo_trl.tools.builtin import ToolArguments

    settings, tool_arguments = parse_settings((EvalSettings, ToolArguments), words, usage=USAGE)
    run = settings.adapter or settings.model
    found = None if run is None else EvaluationSettings.of_run(run)
    if found is None:
        return settings, tool_arguments
    settings, tool_arguments = parse_settings((EvalSettings, ToolArguments), words, found.values, usage=USAGE)
    say(f"{run}: {found.summary(vars(settings) | vars(tool_arguments))}", to=sys.stderr)
    return settings, tool_arguments
