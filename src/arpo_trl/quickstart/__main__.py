"""`arpo-trl quickstart`: build, cold-start and train a small tool-using model, then report the results.

This module reads the arguments and says what will happen. `stages` does it, and takes seconds to import.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arpo_trl.command_line import report_errors
from arpo_trl.common.flags import CommandParser, path_in_flag
from arpo_trl.common.shipped import CONFIGS, file_or_shipped
from arpo_trl.common.waiting import say_loading
from arpo_trl.errors import ConfigError, SandboxError
from arpo_trl.runs.output_folder import check_output, remove_earlier_run, sole_run
from arpo_trl.visible import say


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What users are told about a task: its default folder, what the model learns, and the measured duration."""

    output: Path
    purpose: str
    duration: str


TASKS = {
    "search": Announced(
        output=Path("runs/quickstart"), purpose="search and compute", duration="four minutes on two CPU cores"
    ),
    "shop": Announced(
        output=Path("runs/quickstart_shop"),
        purpose="act in a shop, an environment",
        duration="eight minutes on one CPU core of a busy machine",
    ),
}


def run(words: Sequence[str] | None = None) -> None:
    """Runs the quickstart with the arguments `words`, or with those of this process.

    Raises:
        ConfigError: The arguments do not fit, or the output folder is in use or contains an earlier quickstart.
        SandboxError: The task needs the python tool, and nothing isolates the model's code on this machine.
    """
    arguments = _arguments(words)
    task = TASKS[arguments.task]
    if arguments.hard and arguments.task != "search":
        raise ConfigError(f"--hard is a variant of --task search, but the task is {arguments.task}. Remove --hard.")
    config = file_or_shipped(CONFIGS, arguments.config) if arguments.config else None
    output = arguments.output or task.output
    folders = [str(output / name) for name in ("sft", "rl")]
    if arguments.task == "search":
        _check_isolation()
    with sole_run(str(output), "--output"):
        for folder in folders:
            check_output(folder, resume=None, overwrite=arguments.overwrite_output_dir, setting="--output")
        if arguments.overwrite_output_dir:
            for folder in folders:
                with sole_run(folder):
                    remove_earlier_run(folder)
        say(
            f"The quickstart builds a tiny model that learns to {task.purpose}. Stage 1 trains it on demonstrations "
            "of tool calls, stage 2 with ARPO. Before and after stage 2 it answers held-out tasks.\n"
            f"This takes about {task.duration} and downloads nothing. All output goes to {output}."
        )
        say_loading("arpo-trl quickstart")
        from arpo_trl.quickstart import stages

        with stages.ended_by_sigterm():
            stages.run(arguments.task, output, arguments.seed, hard=arguments.hard, config=config)


main = report_errors(run)


def _check_isolation() -> None:
    """Checks that the python tool works here, which stage 2 and the measurements use.

    Raises:
        SandboxError: Nothing isolates the model's code on this machine.
    """
    from arpo_trl.tools.python.sandbox import isolating_tier

    try:
        isolating_tier()
    except SandboxError as error:
        raise SandboxError(
            f"{error}. The quickstart's model writes Python code, which must be isolated. Without isolation, "
            "run arpo-trl quickstart --task shop."
        ) from error


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    durations = "; ".join(f"{name}: about {task.duration}" for name, task in TASKS.items())
    parser = CommandParser(
        prog="arpo-trl quickstart",
        description="Builds a tiny model, trains it on demonstrations of tool calls, trains it with ARPO and reports "
        f"the results, on a CPU. Downloads nothing. Duration of {durations}.",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--task",
        choices=list(TASKS),
        default="search",
        help="search: questions for search and python; shop: orders in a shop, an environment (default: search)",
    )
    parser.add_argument("--output", type=path_in_flag, help="default: runs/quickstart, or runs/quickstart_shop")
    parser.add_argument("--hard", action="store_true", help="search only: queries have many forms, which is harder")
    parser.add_argument("--config", help="name or file of stage 2's settings; default: the task's")
    parser.add_argument(
        "--overwrite_output_dir",
        nargs="?",  # train and sft take the word, too
        type=str.lower,
        choices=["true", "false"],
        const="true",
        default="false",
        help="remove an earlier quickstart in --output",
    )
    arguments = parser.parse_args(words)
    arguments.overwrite_output_dir = arguments.overwrite_output_dir == "true"
    return arguments


if __name__ == "__main__":
    main()
