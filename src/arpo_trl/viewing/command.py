"""The commands that show a run: `view`, `tree`, `plot` and `timeline`. Heavy imports are deferred until a command
runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from arpo_trl.common.files import write_whole
from arpo_trl.common.flags import path_in_flag
from arpo_trl.errors import DataError
from arpo_trl.logs.curves import PANELS
from arpo_trl.visible import say


def add_commands(commands: Any) -> None:
    """Adds the commands to the sub-parsers of `arpo-trl`."""
    tree = commands.add_parser(
        "tree",
        help="list the steps of a run, and show logged trees",
        description="Lists the steps of a run that have logged trees, or shows the trees of one step as text.",
    )
    tree.add_argument(
        "run_folder",
        metavar="RUN",
        type=path_in_flag,
        help="output_dir of the run, or a .jsonl file of its trajectories",
    )
    tree.add_argument("--step", type=int, help="show the trees of this step")
    tree.add_argument("--group", type=int, help="only the trees of this group")
    tree.add_argument("--full", action="store_true", help="show whole texts")

    view = commands.add_parser(
        "view",
        help="show a run in the browser: curves, groups, trees",
        description="Writes one self-contained page with a run's curves, groups and trees, or serves it (--serve).",
    )
    view.add_argument("run_folder", metavar="RUN", type=path_in_flag, help="output_dir of the run")
    view.add_argument("--output", type=path_in_flag, metavar="FILE", help="page to write (default: RUN/view.html)")
    view.add_argument(
        "--leaves",
        type=at_least_one,
        default=20_000,
        metavar="N",
        help="maximum number of leaves, newest first (default: %(default)s)",
    )
    view.add_argument(
        "--serve", action="store_true", help="serve the page on 127.0.0.1 and follow the run; Ctrl-C stops it"
    )
    view.add_argument("--port", type=int, default=8123, help="port of --serve; 0: a free one (default: %(default)s)")
    view.add_argument("--open", action="store_true", help="open the page in a browser")

    plot = commands.add_parser(
        "plot",
        help="draw curves of one or more runs",
        description="Draws curves of one or more runs as PNG, SVG or PDF.",
    )
    plot.add_argument("runs", metavar="RUN", type=path_in_flag, nargs="+", help="output_dir of a run")
    plot.add_argument(
        "--kind",
        choices=[panel.name for panel in PANELS],
        default="reward",
        help="what to draw (default: %(default)s)",
    )
    plot.add_argument("--output", type=path_in_flag, metavar="FILE", help="picture to write (default: RUN/KIND.png)")

    timeline = commands.add_parser(
        "timeline",
        help="write the timeline of a rollout for Perfetto",
        description="Writes the times at which each path of a rollout decoded, ran tools and waited, for https://ui.perfetto.dev.",
    )
    timeline.add_argument("run_folder", metavar="RUN", type=path_in_flag, help="output_dir of the run")
    timeline.add_argument("--step", type=int, help="step of the rollout (default: the newest)")
    timeline.add_argument(
        "--output", type=path_in_flag, metavar="FILE", help="file to write (default: in RUN/trajectories)"
    )


def at_least_one(text: str) -> int:
    """The number in a flag; argparse prints the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected an integer of at least 1")
    return int(text)


def tree_run(arguments: argparse.Namespace) -> None:
    """`arpo-trl tree`."""
    from arpo_trl.viewing.terminal import show_trees

    show_trees(arguments.run_folder, step=arguments.step, group=arguments.group, full=arguments.full)


def view_run(arguments: argparse.Namespace) -> None:
    """`arpo-trl view`."""
    from arpo_trl.viewing.page import page
    from arpo_trl.viewing.run import RunReader, required_log_files

    run: Path = arguments.run_folder
    reader = RunReader(run, arguments.leaves)
    if arguments.serve:
        return _serve(reader, arguments)
    required_log_files(run)
    reader.refresh()
    if not reader.files:
        raise DataError(f"{run} has no readable trees.")
    output: Path = arguments.output or run / "view.html"
    write_whole(output, page(reader))
    say(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    if arguments.open:
        _open(output.resolve().as_uri())


def plot_run(arguments: argparse.Namespace) -> None:
    """`arpo-trl plot`."""
    from arpo_trl.viewing.plot import draw_plot

    say(str(draw_plot(arguments.runs, arguments.kind, arguments.output)))


def timeline_run(arguments: argparse.Namespace) -> None:
    """`arpo-trl timeline`."""
    from arpo_trl.viewing.timeline import write_timeline

    path = write_timeline(arguments.run_folder, arguments.step, arguments.output)
    say(f"{path} (open it in https://ui.perfetto.dev, which reads it in the browser)")


def _serve(reader: Any, arguments: argparse.Namespace) -> None:
    from arpo_trl.viewing.server import ViewServer

    reader.refresh()
    with ViewServer(reader, arguments.port) as server:
        say(f"{server.url} shows {reader.run} and follows it. Ctrl-C stops the server.")
        if arguments.open:
            _open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")


def _open(url: str) -> None:
    import webbrowser

    webbrowser.open(url)
