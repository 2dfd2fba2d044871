"""The `arpo-trl` command. Each sub-command imports its heavy dependencies only when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import arpo_trl
from arpo_trl.common.flags import NEAR, CommandParser, nearest
from arpo_trl.common.noise import hide_noise
from arpo_trl.common.waiting import say_loading
from arpo_trl.errors import ArpoError, ConfigError, DataError, Interrupted
from arpo_trl.viewing.command import add_commands as add_viewing_commands
from arpo_trl.visible import say

if TYPE_CHECKING:
    from arpo_trl.tools.search.cache import SearchCache

T = TypeVar("T")

COMMANDS = {
    "train": ("launch:train", "train a tool-using policy, through accelerate"),
    "sft": ("launch:sft", "cold start: supervised training on demonstrations, through accelerate"),
    "quickstart": ("launch:quickstart", "train a tiny model to search and compute, on a CPU, in minutes"),
    "new": ("new:main", "create a project: configuration, tool, reward and data, ready to run"),
    "doctor": ("doctor:main", "show which features work on this machine, and why others do not"),
    "ask": ("ask:main", "ask a trained model one question, with its tools"),
}
"""Command → its function in `arpo_trl.commands`, which parses its own arguments, and its line in the help."""

CONFIG_TWICE = "--config is set twice; expected one file. Flags override its settings."


def report_errors(main: Callable[[], T]) -> Callable[[], T]:
    """Wraps `main`: prints this package's errors in one line and exits with status 2. Other errors keep their
    traceback.

    An interrupted training run also prints one line, and exits with 128 plus the signal's number.
    """

    @functools.wraps(main)
    def wrapped() -> T:
        try:
            return main()
        except ArpoError as error:
            say(f"{type(error).__name__}: {error}", to=sys.stderr)
            raise SystemExit(2) from None
        except Interrupted as interrupted:
            from arpo_trl.runs.interrupts import leave

            if os.environ.get("RANK", "0") == "0":
                say(str(interrupted), to=sys.stderr)
            leave(interrupted.exit_status)

    return wrapped


def parse_settings(
    kinds: Sequence[type[Any]],
    argv: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    elsewhere: str | None = None,
    **parser: Any,
) -> tuple[Any, ...]:
    """Creates one instance of each dataclass from the YAML file of `--config` and from flags. Flags take precedence.

    `defaults` replace the fields' defaults. `elsewhere` is the program in `arpo_trl.scripts` whose settings are easily
    confused with these, for the errors. `parser` is passed to the argument parser.

    Raises:
        ConfigError: The file cannot be read, a key or flag is not a field (the message names the most similar one), or
            a dataclass rejects its values.
    """
    from arpo_trl.common.parser import SettingsParser

    words = _config_apart(sys.argv[1:] if argv is None else argv)
    fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    if "--config" in words[:-1]:
        # Checked first, since a dataclass would report the setting that a misspelt key leaves unset.
        keys = [key for key in _read_config(words[words.index("--config") + 1]) if key != "env"]
        _check_names(keys, fields, elsewhere)
    try:
        reader = SettingsParser(kinds, **parser)
        reader.set_defaults_with_config(**(defaults or {}))
        *settings, left = reader.parse_args_and_config(words, return_remaining_strings=True)
    except ConfigError:
        raise
    except ValueError as error:  # raised by TRL's own dataclasses
        raise ConfigError(str(error)) from error
    _check_names(
        [word[2:].partition("=")[0] for word in left if word.startswith("--")], ["config", *fields], elsewhere
    )
    if left:
        raise ConfigError(f"{left[0]!r} does not belong to a setting; expected --name value.")
    return tuple(settings)


def _config_apart(words: Sequence[str]) -> list[str]:
    """The arguments, with --config=FILE split in two.

    Raises:
        ConfigError: --config is set twice, or without a file.
    """
    apart = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else (word,))]
    if apart.count("--config") > 1:
        raise ConfigError(CONFIG_TWICE)
    if apart[-1:] == ["--config"]:
        raise ConfigError("--config is set without a value; expected a YAML file.")
    return apart


def _read_config(path: str) -> dict[Any, Any]:
    from arpo_trl.common.user_files import read_yaml

    try:
        config = read_yaml(Path(path))
    except DataError as error:
        raise ConfigError(f"The --config file cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"The --config file {path} contains a {type(config).__name__}; expected lines of name: value."
        )
    return config


def _check_names(names: Sequence[Any], fields: Sequence[str], elsewhere: str | None) -> None:
    unknown = next((str(name) for name in names if name not in fields), None)
    if unknown is None:
        return
    if elsewhere is not None:
        kinds = importlib.import_module(f"arpo_trl.scripts.{elsewhere}").SETTINGS
        if any(field.name == unknown for kind in kinds for field in dataclasses.fields(kind)):
            raise ConfigError(
                f"There is no setting {unknown!r} here: it is one of arpo-trl {elsewhere}. Run that program, or "
                "remove the setting."
            )
    near = _similar(unknown.replace("-", "_"), fields)
    raise ConfigError(f"There is no setting {unknown!r}" + (f"; did you mean {near}?" if near else ". Remove it."))


def _similar(name: str, fields: Sequence[str]) -> str:
    """The settings that `name` can mean, as text for users: a similar name, or the names with all its words."""
    if (near := nearest(name, fields, cutoff=NEAR)) and not near.startswith(f"{name}_"):
        return repr(near)
    words = set(name.split("_"))
    longer = [field for field in fields if words <= set(field.split("_"))]
    longer.sort(key=lambda field: not field.startswith(name))
    short = [field for field in fields if "".join(word[:1] for word in field.split("_")) == name]
    found = (short or longer)[:3] or [near for near in [nearest(name, fields)] if near]
    return " or ".join(map(repr, found))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="arpo-trl", description="Agentic Reinforced Policy Optimization with TRL.")
    parser.add_argument("--version", action="version", version=f"arpo-trl {arpo_trl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)

    add_viewing_commands(commands)

    commands.add_parser("eval", help="evaluate a model on benchmarks or a file of questions", add_help=False)

    compare = commands.add_parser(
        "compare",
        help="test whether one evaluation is better than another",
        description="Compares two runs of `arpo-trl eval` on their common questions: paired bootstrap and McNemar.",
    )
    compare.add_argument("run_a", type=Path, help="output folder of the first run")
    compare.add_argument("run_b", type=Path, help="output folder of the second run")
    compare.add_argument("--plot", type=Path, help="picture to write (default: in RUN_B)")

    index = commands.add_parser(
        "index",
        help="build a search index",
        description="Builds a BM25 index over passages and saves it. Takes two minutes per million passages.",
    )
    index.add_argument("passages", help="a .jsonl file, a folder of such files, or a dataset on the Hub")
    index.add_argument("folder", type=Path, help="folder to save the index in")

    merge = commands.add_parser(
        "merge",
        help="merge a LoRA adapter into its base model",
        description="Merges an adapter into its base model and saves the result with tokenizer and chat template.",
    )
    merge.add_argument("adapter", help="folder or Hub id of the adapter")
    merge.add_argument("--output", type=Path, required=True, help="new folder for the merged model")
    merge.add_argument("--base", help="base model (default: the one named in the adapter)")
    merge.add_argument("--dtype", help="dtype such as bfloat16 (default: the base model's)")
    merge.add_argument("--push-to-hub", metavar="REPO", help="repository to push the merged model to")

    push = commands.add_parser(
        "push",
        help="push a finished run to the Hub",
        description="Pushes a run's folder: model, card and curves, its trajectories as a dataset, or both.",
    )
    push.add_argument("run", type=Path, help="output_dir of the run")
    push.add_argument("--repo", help="model repository")
    push.add_argument("--trajectories", metavar="REPO", help="dataset repository for the logged trajectories")
    push.add_argument(
        "--evaluation", type=Path, help="output folder of `arpo-trl eval`; its table is added to the card"
    )
    push.add_argument("--private", action="store_true", help="create new repositories as private")

    cache = commands.add_parser(
        "cache", help="inspect a search cache", description="Inspects, exports or fills a search cache."
    )
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    stats = actions.add_parser("stats", help="show statistics of the cache")
    export = actions.add_parser("export", help="write the results as JSON {query: result text}")
    load = actions.add_parser("import", help="add results from such a JSON file")
    for action in (stats, export, load):
        action.add_argument("cache", type=Path, help="the file that search_cache names")
    export.add_argument("file", type=Path, help="JSON file to write")
    export.add_argument("--provider", help="only results of this search_provider (default: all)")
    load.add_argument("file", type=Path, help="JSON file to read")
    load.add_argument("--provider", required=True, help="search_provider to store the results under")
    load.add_argument("--top-k", type=int, default=10, help="search_top_k to store the results under (default: 10)")
    return parser


def _eval_parser() -> argparse.ArgumentParser:
    """Prints the help of `arpo-trl eval`. `parse_settings` does the parsing."""
    from arpo_trl.evaluation.settings import GROUPS, EvalSettings

    parser = CommandParser(
        prog="arpo-trl eval",
        usage=EVAL_USAGE,
        description="Answers questions with the tools, as in training but without branching, and scores the answers.",
        epilog="The settings of tools are those of train.py: --tools search python, --search-index FILE, "
        "--search-top-k 10, --search-provider NAME, --search-recorded FILE, --python-timeout-s 5, --allow-unsafe and "
        "others (docs/tools.md). The YAML file of --config may contain every setting, with _ for -. Flags take "
        "precedence. "
        "Exit status: 0 success, 1 some samples failed, 2 usage error.",
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
        make = setting.default_factory
        default = setting.default if make is dataclasses.MISSING else " ".join(make())
        text = setting.metadata["help"]
        if default not in (None, False, "") and "default" not in text:
            text += f" (default: {default})"
        metavar = setting.metadata.get("metavar", setting.name.split("_")[-1].upper())
        kind: Any = {"action": "store_true"} if default is False else {"metavar": metavar}
        group.add_argument(f"--{setting.name.replace('_', '-')}", help=text, **kind)
    return parser


EVAL_USAGE = "arpo-trl eval --model MODEL (--benchmarks NAMES | --suite SUITE | --data PATH) [options]"


def main() -> None:
    """Entry point. Exit status: 0 success, 1 an evaluation lacks samples, 2 a usage or configuration error."""
    raise SystemExit(_main())


@report_errors
def _main() -> int:
    hide_noise()
    try:
        return _command()
    except OSError as error:  # if it names a file, it is about a path from the user
        if error.filename is None or os.environ.get("ARPO_TRACEBACK") == "1":
            raise
        raise ConfigError(
            f"{type(error).__name__}: {error}. Check the path, and whether its folder is writable. (Set "
            "ARPO_TRACEBACK=1 to see where it was raised.)"
        ) from error


def _command() -> int:
    if sys.argv[1:2] == ["eval"]:  # its flags are the fields of its settings, whose import is slow
        return _eval(sys.argv[2:])
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        module, _, function = COMMANDS[sys.argv[1]][0].partition(":")
        return int(getattr(importlib.import_module(f"arpo_trl.commands.{module}"), function)(sys.argv[2:]))
    arguments = _parser().parse_args()
    if hasattr(arguments, "call"):
        return arguments.call(arguments) or 0
    commands = {"compare": _compare, "index": _index, "cache": _cache}
    commands |= {"merge": _merge, "push": _push}
    return commands[arguments.command](arguments) or 0


def _eval(words: Sequence[str]) -> int:
    if {"-h", "--help"} & set(words):
        _eval_parser().print_help()
        return 0
    if not words:
        _eval_parser().error("a model and questions are required; see --help")
    say_loading("arpo-trl eval")
    from arpo_trl.evaluation.command import evaluate

    return evaluate(*parse_evaluation(words))


def parse_evaluation(words: Sequence[str]) -> tuple[Any, Any]:
    """The `EvalSettings` and `ToolArguments` of a command line, with a run's settings as defaults.

    Prints these settings in one line to standard error.
    """
    from arpo_trl.evaluation.settings import EvalSettings
    from arpo_trl.publishing.trained_settings import EvaluationSettings
    from arpo_trl.tools.builtin import ToolArguments

    settings, tool_arguments = parse_settings((EvalSettings, ToolArguments), words, usage=EVAL_USAGE)
    run = settings.adapter or settings.model
    found = None if run is None else EvaluationSettings.of_run(run)
    if found is None:
        return settings, tool_arguments
    settings, tool_arguments = parse_settings((EvalSettings, ToolArguments), words, found.values, usage=EVAL_USAGE)
    say(f"{run}: {found.summary(vars(settings) | vars(tool_arguments))}", to=sys.stderr)
    return settings, tool_arguments


def _compare(arguments: argparse.Namespace) -> int:
    say_loading("arpo-trl compare")
    from arpo_trl.evaluation.command import compare_runs

    return compare_runs(arguments.run_a, arguments.run_b, arguments.plot)


def _index(arguments: argparse.Namespace) -> None:
    from arpo_trl.tools.search.index import LocalIndex

    index = LocalIndex.open(arguments.passages)
    index.save(arguments.folder)
    say(f"{len(index):,} passages indexed in {arguments.folder}")


def _merge(arguments: argparse.Namespace) -> None:
    say_loading("arpo-trl merge")
    from arpo_trl.publishing.merging import merge_adapter

    if arguments.push_to_hub is not None:
        from arpo_trl.publishing.push import Snapshot, prepare_repo, push_snapshot

        repo_id = prepare_repo(arguments.push_to_hub, setting="--push-to-hub")  # before the work, not after it
    merge_adapter(
        arguments.adapter, arguments.output, base=arguments.base, dtype=arguments.dtype, repo_id=arguments.push_to_hub
    )
    say(f"Merged model saved in {arguments.output}")
    if arguments.push_to_hub is not None:
        commit = push_snapshot(repo_id, Snapshot(run=arguments.output, model=arguments.output), message="Merged model")
        say(f"Pushed: {commit.commit_url}")


def _push(arguments: argparse.Namespace) -> None:
    from arpo_trl.evaluation.report import saved_table
    from arpo_trl.publishing.push import push_run

    private = True if arguments.private else None
    table = None if arguments.evaluation is None else saved_table(arguments.evaluation)
    for url in push_run(arguments.run, arguments.repo, arguments.trajectories, evaluation=table, private=private):
        say(f"Pushed: {url}")


def _cache(arguments: argparse.Namespace) -> None:
    import sqlite3

    from arpo_trl.tools.search.cache import SearchCache

    if arguments.action != "import" and not arguments.cache.exists():
        raise DataError(f"There is no search cache {arguments.cache}. Check the path.")
    cache = SearchCache(arguments.cache)
    try:
        _on_cache(cache, arguments)
    except sqlite3.Error as error:
        raise cache.unusable(error) from error


def _on_cache(cache: SearchCache, arguments: argparse.Namespace) -> None:
    from arpo_trl.tools.search.providers import PROVIDERS

    match arguments.action:
        case "stats":
            say(json.dumps(cache.stats(), indent=2))
        case "export":
            count = cache.export_json(arguments.file, arguments.provider)
            say(f"{count:,} queries written to {arguments.file}")
        case "import":
            parameters = PROVIDERS.get(arguments.provider).parameters(arguments.top_k)
            count = cache.import_json(arguments.file, arguments.provider, parameters)
            say(f"{count:,} queries imported from {arguments.file}")
