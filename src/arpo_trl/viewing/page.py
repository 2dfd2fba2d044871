"""One self-contained page that shows a run: its curves, its groups and their trees.

The page contains all data as JSON: one block for the index, and one per tree, which the page parses when the tree is
opened. Text of models and tools is untrusted. It is embedded as JSON without any `<`, and the script inserts it into
the document only as text. The content security policy allows only the page's own script, by its hash. It allows no
requests, except to the page's own server for a live run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2

from arpo_trl.logs.curves import PANELS, curves
from arpo_trl.logs.metrics import Tally
from arpo_trl.viewing.history import whole_history
from arpo_trl.viewing.page_tree import PageTree, as_json
from arpo_trl.viewing.run import ReadFile, RunReader
from arpo_trl.visible import visible


def page(reader: RunReader, *, live: bool = False) -> str:
    """The page of the run as HTML. `live`: the page requests updates from its own server."""
    chosen, left_out = newest(reader)
    index = index_of(reader) | {"left_out": left_out, "live": live}
    index["groups"] = [tree.summary for _, tree in chosen]
    source = files("arpo_trl.viewing")
    script = source.joinpath("page.js").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source.joinpath("page.html.jinja").read_text("utf-8")).render(
        title=visible(index["name"]),
        style=source.joinpath("page.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        live=live,
        index=as_json(index),
        trees=[(tree.summary["key"], tree.json) for _, tree in chosen],
    )


def changes(reader: RunReader, after: int) -> dict[str, Any]:
    """The changes since the revision `after`: index, existing files, and new groups with their trees. Without changes
    only the revision."""
    if after == reader.revision:
        return {"revision": after}
    chosen, left_out = newest(reader)
    if after > reader.revision:  # that of a server on which the clock was ahead
        after = 0
    new = [tree for file, tree in chosen if file.revision > after]
    return index_of(reader) | {
        "left_out": left_out,
        "files": [file.path.name for file in reader.files],
        "groups": [tree.summary | {"tree": json.loads(tree.json)} for tree in new],
    }


def newest(reader: RunReader) -> tuple[list[tuple[ReadFile, PageTree]], int]:
    """The newest trees, at least one, with at most `reader.max_leaves` leaves in total, each with its file, in the
    order of the files; and the number of omitted trees."""
    held = [(file, tree) for file in reader.files.values() for tree in file.trees or ()]
    start, leaves = len(held), 0
    while start and (leaves + held[start - 1][1].leaves <= reader.max_leaves or not leaves):
        start -= 1
        leaves += held[start][1].leaves
    return held[start:], start + sum(file.count for file in reader.files.values() if file.trees is None)


def index_of(reader: RunReader) -> dict[str, Any]:
    """Name, revision and curves of the run."""
    return _index_at(reader, reader.revision)


@lru_cache(maxsize=1)  # one computation for all pages that a server updates
def _index_at(reader: RunReader, revision: int) -> dict[str, Any]:
    by_step: dict[int, list[Tally]] = {}
    for file, read in reader.files.items():
        if read.tally is not None:
            by_step.setdefault(file.step, []).append(read.tally)
    history, first_of_trees = whole_history(reader.history, by_step)
    drawn = [(panel, curves(panel, history)) for panel in PANELS]
    return {
        "name": reader.run.resolve().name if reader.run.name in ("", ".", "..") else str(reader.run),
        "revision": revision,
        "trees_from": first_of_trees,
        "panels": [
            {"title": panel.title, "unit": panel.unit, "note": panel.note, "lines": lines}
            for panel, lines in drawn
            if lines
        ],
    }
