"""The `arpo-trl` command. Heavy imports wait until a sub-command needs them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arpo_trl.errors import ArpoError, ConfigError


def report_errors(main: Callable[[], None]) -> Callable[[], None]:
    """`main` with this package's errors as one line and exit status 2; others keep their traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except ArpoError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped


def parse_settings(kinds: Sequence[type[Any]], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass from the command line and the YAML file behind `--config`; flags win.

    Raises:
        ConfigError: The file cannot be read, a key or flag is nobody's field (the nearest one is named), or a
            dataclass refuses its values.
    """
    from trl import TrlParser

    words = list(sys.argv[1:] if argv is None else argv)
    fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    if "--config" in words[:-1]:
        # Before the dataclasses see the rest of the file: they would complain of what a misspelt key left unset.
        _check_names([key for key in _read_config(words[words.index("--config") + 1]) if key != "env"], fields)
    try:
        *settings, left = TrlParser(kinds).parse_args_and_config(words, return_remaining_strings=True)
    except ConfigError:
        raise
    except ValueError as error:  # what TRL's own dataclasses refuse
        raise ConfigError(str(error)) from error
    _check_names([word[2:].partition("=")[0] for word in left if word.startswith("--")], fields)
    if left:
        raise ConfigError(f"{left[0]!r} belongs to no setting. Write --name value.")
    return tuple(settings)


def _read_config(path: str) -> dict[Any, Any]:
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"The --config file cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"The --config file {path} holds a {type(config).__name__}; expected lines of name: value.")
    return config


def _check_names(names: Sequence[Any], fields: Sequence[str]) -> None:
    for name in names:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            raise ConfigError(
                f"There is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ". Remove it.")
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="arpo-trl", description="Agentic Reinforced Policy Optimization with TRL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    tree = commands.add_parser("tree", help="show the trees of a trajectory log", description="Shows logged trees.")
    tree.add_argument(
        "log", type=Path, help="a .jsonl file of <output_dir>/trajectories, or that folder (its last file)"
    )
    tree.add_argument("--index", type=int, default=None, help="only this tree of the file, counted from 0")

    evaluate = commands.add_parser(
        "eval",
        help="measure a model on a file of questions",
        description="Answers every question with the tools, without branching, and prints the accuracy.",
    )
    evaluate.add_argument("--model", required=True, help="a folder or Hub id")
    evaluate.add_argument("--data", required=True, help="a dataset as train.py takes it: file, folder or Hub id")
    evaluate.add_argument("--split", default="train", help="its split (default: train)")
    evaluate.add_argument("--tools", nargs="*", default=["search", "python"], help="built-in tools (default: both)")
    evaluate.add_argument("--search-index", help="JSONL of passages, or saved index folder")
    evaluate.add_argument("--search-recorded", help="JSON file of recorded searches")
    evaluate.add_argument("--search-top-k", type=int, default=10, help="results per search (default: 10)")
    evaluate.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6, the paper's)")
    evaluate.add_argument("--top-p", type=float, default=0.95, help="default: 0.95, the paper's")
    evaluate.add_argument("--samples", type=int, default=1, help="answers per question (default: 1)")
    evaluate.add_argument("--max-completion-length", type=int, default=4096, help="tokens (default: 4096)")
    evaluate.add_argument("--max-tool-calls", type=int, default=15, help="per answer (default: 15)")
    evaluate.add_argument("--limit", type=int, default=None, help="only the first questions")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--allow-unsafe", action="store_true", help="run python unsandboxed where it must be")

    index = commands.add_parser(
        "index",
        help="build a search index",
        description="Builds a BM25 index over passages and saves it. Two minutes per million passages.",
    )
    index.add_argument("passages", help="a .jsonl file, a folder of them, or a dataset on the Hub")
    index.add_argument("folder", type=Path, help="where to save the index")

    cache = commands.add_parser("cache", help="look into a search cache", description="Looks into a search cache.")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    stats = actions.add_parser("stats", help="count what it holds")
    export = actions.add_parser("export", help="write its results as JSON {query: result text}")
    load = actions.add_parser("import", help="take in results from such a JSON file")
    for action in (stats, export, load):
        action.add_argument("cache", type=Path, help="the file that search_cache names")
    export.add_argument("file", type=Path, help="the JSON file to write")
    export.add_argument("--provider", help="only what this one found (default: all)")
    load.add_argument("file", type=Path, help="the JSON file to read")
    load.add_argument("--provider", required=True, help="the search_provider whose results they shall be")
    load.add_argument("--top-k", type=int, default=10, help="the search_top_k they answer (default: 10)")
    return parser


@report_errors
def main() -> None:
    """Entry point: exit status 0, 2 for a usage or configuration error."""
    arguments = _parser().parse_args()
    {"tree": _tree, "eval": _eval, "index": _index, "cache": _cache}[arguments.command](arguments)


def _tree(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from arpo_trl.errors import DataError
    from arpo_trl.render import render_tree
    from arpo_trl.trajectories import read_trees

    path: Path = arguments.log
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"{path} holds no .jsonl file. Was trajectory_log_rate 0?")
        path = files[-1]
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a file or the folder <output_dir>/trajectories.")
    trees = list(read_trees(path))
    if arguments.index is not None:
        if not 0 <= arguments.index < len(trees):
            raise DataError(f"--index is {arguments.index} but {path} holds {len(trees)} trees; they count from 0.")
        trees = [trees[arguments.index]]
    console = Console()
    for tree in trees:
        console.print(render_tree(tree))


def _eval(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from arpo_trl.data import load_arpo_dataset
    from arpo_trl.evaluation.runner import evaluate
    from arpo_trl.tools.box import ToolBox
    from arpo_trl.tools.build import ToolArguments, build_tools

    rows = load_arpo_dataset(arguments.data, arguments.split).to_list()[: arguments.limit]
    tools = build_tools(
        ToolArguments(
            arguments.tools,
            arguments.search_index,
            arguments.search_recorded,
            arguments.search_top_k,
            allow_unsafe=arguments.allow_unsafe,
        )
    )
    with ToolBox(tools) as toolbox:
        result = evaluate(
            AutoModelForCausalLM.from_pretrained(arguments.model),
            AutoTokenizer.from_pretrained(arguments.model),
            rows,
            toolbox,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            samples=arguments.samples,
            max_completion_length=arguments.max_completion_length,
            max_tool_calls=arguments.max_tool_calls,
            seed=arguments.seed,
        )
    print(
        json.dumps(
            {
                "accuracy": round(result.accuracy, 4),
                "questions": len(rows),
                "samples": len(result.samples),
                "calls_per_sample": round(result.calls_per_sample, 3),
                "seconds": round(result.rollout.times.total_s, 1),
            },
            indent=2,
        )
    )


def _index(arguments: argparse.Namespace) -> None:
    from arpo_trl.tools.search import LocalIndex

    index = LocalIndex.open(arguments.passages)
    index.save(arguments.folder)
    print(f"{len(index):,} passages indexed in {arguments.folder}")


def _cache(arguments: argparse.Namespace) -> None:
    from arpo_trl.errors import DataError
    from arpo_trl.tools.search_cache import SearchCache
    from arpo_trl.tools.search_providers import provider_kind

    if arguments.action != "import" and not arguments.cache.exists():
        raise DataError(f"There is no search cache {arguments.cache}. Check the path.")
    cache = SearchCache(arguments.cache)
    match arguments.action:
        case "stats":
            print(json.dumps(cache.stats(), indent=2))
        case "export":
            count = cache.export_json(arguments.file, arguments.provider)
            print(f"{count:,} queries written to {arguments.file}")
        case "import":
            parameters = provider_kind(arguments.provider).parameters(arguments.top_k)
            count = cache.import_json(arguments.file, arguments.provider, parameters)
            print(f"{count:,} queries taken in from {arguments.file}")
