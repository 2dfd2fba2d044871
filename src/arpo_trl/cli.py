"""The `arpo-trl` command. Each sub-command imports its heavy dependencies only when it runs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import arpo_trl
from arpo_trl.command_line import keeps_tracebacks, report_errors
from arpo_trl.common.flags import CommandParser, path_in_flag
from arpo_trl.common.full_disk import is_full_disk
from arpo_trl.common.noise import hide_noise
from arpo_trl.common.waiting import say_loading
from arpo_trl.errors import ConfigError
from arpo_trl.viewing import command as viewing
from arpo_trl.visible import say

if TYPE_CHECKING:
    from arpo_trl.tools.search.cache import SearchCache

COMMANDS = {
    "train": ("launch:train", "train a tool-using policy, through accelerate"),
    "sft": ("launch:sft", "cold start: supervised training on demonstrations, through accelerate"),
    "quickstart": ("launch:quickstart", "train a tiny model to search and compute, on a CPU, in minutes"),
    "new": ("new:main", "create a project: configuration, tool, reward and data, ready to run"),
    "doctor": ("doctor:main", "show which features work on this machine, and why others do not"),
    "ask": ("ask:main", "ask a trained model one question, with its tools"),
}
"""Command → its function in `arpo_trl.commands`, which parses its own arguments, and its line in the help."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="arpo-trl", description="Agentic Reinforced Policy Optimization with TRL.")
    parser.add_argument("--version", action="version", version=f"arpo-trl {arpo_trl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)

    viewing.add_commands(commands)

    commands.add_parser("eval", help="evaluate a model on benchmarks or a file of questions", add_help=False)

    compare = commands.add_parser(
        "compare",
        help="test whether one evaluation is better than another",
        description="Compares two runs of `arpo-trl eval` on their common questions: paired bootstrap and McNemar.",
    )
    compare.add_argument("run_a", type=path_in_flag, help="output folder of the first run")
    compare.add_argument("run_b", type=path_in_flag, help="output folder of the second run")
    compare.add_argument("--plot", type=path_in_flag, help="picture to write (default: in RUN_B)")

    index = commands.add_parser(
        "index",
        help="build a search index",
        description="Builds a BM25 index over passages and saves it. Takes two minutes per million passages.",
    )
    index.add_argument("passages", help="a .jsonl file, a folder of such files, or a dataset on the Hub")
    index.add_argument("folder", type=path_in_flag, help="folder to save the index in")

    merge = commands.add_parser(
        "merge",
        help="merge a LoRA adapter into its base model",
        description="Merges an adapter into its base model and saves the result with tokenizer and chat template.",
    )
    merge.add_argument("adapter", help="folder or Hub id of the adapter")
    merge.add_argument("--output", type=path_in_flag, required=True, help="new folder for the merged model")
    merge.add_argument("--base", help="base model (default: the one named in the adapter)")
    merge.add_argument("--dtype", help="dtype such as bfloat16 (default: the base model's)")
    merge.add_argument("--trust-remote-code", action="store_true", help="allow the base model to run code of its own")
    merge.add_argument("--push-to-hub", metavar="REPO", help="repository to push the merged model to")

    push = commands.add_parser(
        "push",
        help="push a finished run to the Hub",
        description="Pushes a run's folder: model, card and curves, its trajectories as a dataset, or both.",
    )
    push.add_argument("run", type=path_in_flag, help="output_dir of the run")
    push.add_argument("--repo", help="model repository")
    push.add_argument("--revision", metavar="BRANCH", help="branch of --repo, created if new (default: main)")
    push.add_argument("--trajectories", metavar="REPO", help="dataset repository for the logged trajectories")
    push.add_argument(
        "--evaluation", type=path_in_flag, help="output folder of `arpo-trl eval`; its table is added to the card"
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
        action.add_argument("cache", type=path_in_flag, help="the file that search_cache names")
    export.add_argument("file", type=path_in_flag, help="JSON file to write")
    export.add_argument("--provider", help="only results of this provider, as `stats` names it (default: all)")
    load.add_argument("file", type=path_in_flag, help="JSON file to read")
    load.add_argument("--provider", required=True, help="search_provider to store the results under")
    load.add_argument("--url", help="search_url to store the results under, if the provider needs no key")
    load.add_argument("--top-k", type=int, default=10, help="search_top_k to store the results under (default: 10)")
    return parser


def main() -> None:
    """Entry point. Exit status: 0 success, 1 an evaluation lacks samples, 2 a usage or configuration error."""
    raise SystemExit(_main())


@report_errors
def _main() -> int:
    hide_noise()
    try:
        return _command()
    except OSError as error:  # if it names a file, it is about a path from the user
        if error.filename is None or is_full_disk(error) or keeps_tracebacks():
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
    commands: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "compare": _compare,
        "index": _index,
        "cache": _cache,
        "merge": _merge,
        "push": _push,
        "tree": viewing.tree_run,
        "view": viewing.view_run,
        "plot": viewing.plot_run,
        "timeline": viewing.timeline_run,
    }
    return commands[arguments.command](arguments) or 0


def _eval(words: Sequence[str]) -> int:
    from arpo_trl.evaluation.parsing import help_parser, parse_evaluation

    if {"-h", "--help"} & set(words):
        help_parser().print_help()
        return 0
    if not words:
        help_parser().error("a model and questions are required; see --help")
    say_loading("arpo-trl eval")
    from arpo_trl.evaluation.command import evaluate

    return evaluate(*parse_evaluation(words))


def _compare(arguments: argparse.Namespace) -> int:
    say_loading("arpo-trl compare")
    from arpo_trl.evaluation.command import compare_runs

    return compare_runs(arguments.run_a, arguments.run_b, arguments.plot)


def _index(arguments: argparse.Namespace) -> None:
    from arpo_trl.tools.search.index import LocalIndex

    index = LocalIndex.open(arguments.passages)
    replaced = index.save(arguments.folder)
    earlier = "" if replaced is None else f"; they replace an index of {replaced:,} passages"
    say(f"{len(index):,} passages indexed in {arguments.folder}{earlier}")


def _merge(arguments: argparse.Namespace) -> None:
    say_loading("arpo-trl merge")
    from arpo_trl.publishing.merging import merge_adapter

    if arguments.push_to_hub is not None:
        from arpo_trl.publishing.push import Snapshot, prepare_repo, push_snapshot

        repo_id = prepare_repo(arguments.push_to_hub, setting="--push-to-hub")  # before the work, not after it
    merge_adapter(
        arguments.adapter,
        arguments.output,
        base=arguments.base,
        dtype=arguments.dtype,
        repo_id=arguments.push_to_hub,
        trust_remote_code=arguments.trust_remote_code,
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
    urls = push_run(
        arguments.run,
        arguments.repo,
        arguments.trajectories,
        revision=arguments.revision,
        evaluation=table,
        private=private,
    )
    for url in urls:
        say(f"Pushed: {url}")


def _cache(arguments: argparse.Namespace) -> None:
    import sqlite3

    from arpo_trl.tools.search.cache import SearchCache

    if arguments.action == "import" and arguments.top_k < 1:
        raise ConfigError(f"--top-k is {arguments.top_k}; expected an integer of at least 1.")
    cache = SearchCache(arguments.cache, writes=arguments.action == "import")
    try:
        _on_cache(cache, arguments)
    except sqlite3.Error as error:
        raise cache.unusable(error) from error


def _on_cache(cache: SearchCache, arguments: argparse.Namespace) -> None:
    from arpo_trl.tools.search.providers import make_provider

    match arguments.action:
        case "stats":
            say(json.dumps(cache.stats(), indent=2))
        case "export":
            count = cache.export_json(arguments.file, arguments.provider)
            say(f"{count:,} queries written to {arguments.file}")
        case "import":
            # The zone is no part of the key; Bright Data needs one.
            provider = make_provider(arguments.provider, url=arguments.url, zone="any", setting="--url")
            parameters, longest = provider.parameters(arguments.top_k), provider.max_query_chars
            count = cache.import_json(arguments.file, provider.source, parameters, longest)
            say(f"{count:,} queries imported from {arguments.file}")


if __name__ == "__main__":
    main()
